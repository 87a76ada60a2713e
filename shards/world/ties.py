"""Exact expectations of retrieval metrics when tied images come in uniformly random order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

RANKS = (1, 5, 10)
METRICS = ("R1", "R5", "R10", "mAP", "mINP")


@dataclass(frozen=True)
class Tie:
    """Images that a reader cannot tell apart.

    Attributes:
        size: Images.
        positives: Positives of the query among them.
    """

    size: int
    positives: int


Ranking = tuple[Tie, ...]
"""The ties of one query from the best to the worst; what follows the last positive may be left out."""


def ranking(keys: Sequence[tuple[int, ...]], positive: Sequence[bool]) -> Ranking:
    """Return the ties of images with equal keys, the smallest key first, up to the last positive."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for key, hit in zip(keys, positive, strict=True):
        count = sizes.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += hit
    ties = [Tie(*sizes[key]) for key in sorted(sizes)]
    while ties and not ties[-1].positives:
        ties.pop()
    return tuple(ties)


def expected_metrics(ties: Ranking) -> dict[str, float]:
    """Return the expectation of each metric over the orders inside each tie, as shares.

    Within a tie of n images and r positives, with m images and p positives ahead and R positives in all:
    R@K of the first tie with positives is 1 - C(n - K + m, r) / C(n, r); the tie adds
    1/R * r/n * sum_k (p + 1 + (k-1)(r-1)/(n-1)) / (m + k) to E[AP], since place k holds a positive with probability
    r/n and then (k-1)(r-1)/(n-1) positives of the tie are expected before it; for the last tie,
    E[INP] = sum_l R / (m + l) * C(l-1, r-1) / C(n, r), l being the place of its last positive.

    Args:
        ties: Of one query, with at least one positive.
    """
    total = sum(tie.positives for tie in ties)
    result = dict.fromkeys(METRICS, 0.0)
    ahead = found = 0
    for tie in ties:
        n, r = tie.size, tie.positives
        if r:
            orders = comb(n, r)
            if not found:
                for rank in RANKS:
                    result[f"R{rank}"] = 1.0 - comb(max(n - max(rank - ahead, 0), 0), r) / orders
            slope = (r - 1) / (n - 1) if n > 1 else 0.0
            precision = sum((found + 1 + (k - 1) * slope) / (ahead + k) for k in range(1, n + 1))
            result["mAP"] += precision / n * (r / total)
            if found + r == total:
                result["mINP"] = _inverse_negative_penalty(ahead, tie, total, orders)
        ahead, found = ahead + n, found + r
    return result


def _inverse_negative_penalty(ahead: int, tie: Tie, total: int, orders: int) -> float:
    value, ways = 0.0, 1  # ways = C(last - 1, r - 1): orders in which the last positive has this place
    for last in range(tie.positives, tie.size + 1):
        value += total / (ahead + last) * (ways / orders)
        ways = ways * last // (last - tie.positives + 1)
    return value


def mean_metrics(rankings: Iterable[Ranking]) -> dict[str, float]:
    """Return the mean metrics in percent and the number of queries."""
    cache: dict[Ranking, dict[str, float]] = {}
    sums = dict.fromkeys(METRICS, 0.0)
    queries = 0
    for ties in rankings:
        if ties not in cache:
            cache[ties] = expected_metrics(ties)
        queries += 1
        for name in METRICS:
            sums[name] += cache[ties][name]
    scale = 100.0 / max(queries, 1)
    return {**{name: value * scale for name, value in sums.items()}, "queries": float(queries)}
