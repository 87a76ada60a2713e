"""What a random order of the gallery is expected to score, in closed form.

Shape suffixes: Q queries, G gallery entries, E pairs of a query and a gallery entry of its identity, N ranks.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.evaluation.counting import SameIdentity
from reid_dist.evaluation.ranking import Metrics


def chance_metrics(
    query_pid_Q: Tensor,
    gallery_pid_G: Tensor,
    query_camid_Q: Tensor | None = None,
    gallery_camid_G: Tensor | None = None,
) -> Metrics:
    """Exact expectation of every metric when the gallery is shuffled uniformly for each query.

    With r positives among n kept entries R@k is hypergeometric,
    E[AP] = (1/n) sum_k (1 + (k-1)(r-1)/(n-1))/k and E[INP] = sum_m (r/m) C(m-1, r-1)/C(n, r).
    Cameras and skipped queries are treated as in `rank_metrics`.

    Raises:
        UserError: no query has a positive.
    """
    queries = len(query_pid_Q)
    query_E, _, kept_E = SameIdentity(gallery_pid_G, gallery_camid_G).pairs(query_pid_Q, query_camid_Q)
    positives_Q, removed_Q = (torch.bincount(query_E[part], minlength=queries) for part in (kept_E, ~kept_E))
    cases = Counter(zip((len(gallery_pid_G) - removed_Q).tolist(), positives_Q.tolist(), strict=True))
    skipped = sum(count for (_, r), count in cases.items() if r == 0)
    valid = {case: count for case, count in cases.items() if case[1] > 0}
    queries_left = sum(valid.values())
    if queries_left == 0:
        raise UserError(f"baselines: none of the {queries} queries has a positive in the gallery")
    expected = {case: _chance_of(*case) for case in valid}
    metrics = {
        key: 100.0 * math.fsum(expected[case][key] * count for case, count in valid.items()) / queries_left
        for key in next(iter(expected.values()))
    }
    return metrics | {
        "queries": float(queries_left),
        "skipped": float(skipped),
        "tied": 0.0,
    }


def _chance_of(n: int, r: int) -> Metrics:
    """Expected metrics in [0, 1] for r positives among n entries in random order."""
    place_N = torch.arange(1, n + 1, dtype=torch.float64)
    others_N = (place_N - 1) * ((r - 1) / max(1, n - 1))
    last_N = torch.arange(r, n + 1, dtype=torch.float64)  # possible ranks of the last positive
    log_all = math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)
    log_last_N = torch.lgamma(last_N) - math.lgamma(r) - torch.lgamma(last_N - r + 1)
    metrics = {f"R{k}": 1.0 - _miss(n, r, k) for k in (1, 5, 10)}
    metrics["mAP"] = float(((1.0 + others_N) / place_N).sum()) / n
    metrics["mINP"] = float(((log_last_N - log_all).exp() * r / last_N).sum())
    return metrics


def _miss(n: int, r: int, k: int) -> float:
    """Probability that none of r positives is among the first k of n."""
    return math.prod(max(0, n - r - i) / (n - i) for i in range(min(k, n)))
