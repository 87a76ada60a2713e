"""Which queries a contact sheet shows, and their ranked lists. For one process: nothing here is a collective.

Shape suffixes: Q queries, K matches, G gallery entries, P positives of a query, D feature,
E gallery entries of its identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import decode_image
from reid_dist.evaluation.benchmark import Task
from reid_dist.evaluation.counting import SameIdentity
from reid_dist.evaluation.features import Features
from reid_dist.evaluation.ranking import Retrieval, rank_queries, top_matches
from reid_dist.report.sheet import Match, SheetRow


def choose_queries(first_Q: Tensor, count: int) -> list[int]:
    """Queries spread from easy to hard: the middles of `count` equal parts of all, ordered by first-hit rank.

    Args:
        first_Q: rank of the first positive, 0 for skipped queries (`QueryRanks.first_Q`).
        count: how many; fewer when there are fewer valid queries.

    Returns:
        Indices of queries; the same for the same ranks.
    """
    valid_V = (first_Q > 0).nonzero().flatten()
    order_V = valid_V[first_Q[valid_V].argsort(stable=True)]
    count = min(count, len(order_V))
    return [int(order_V[(2 * i + 1) * len(order_V) // (2 * count)]) for i in range(count)]


def ranked_rows(shards: ShardSet, features: Features, task: Task | None, count: int = 4, k: int = 10) -> list[SheetRow]:
    """Sheet rows of some queries of a task, from easy to hard. Not a collective: rank 0 alone may call it.

    Args:
        shards: the set that the features come from; its images are shown in their stored size.
        features: of the benchmark.
        task: one of its tasks; None gives no rows.
        count: number of queries.
        k: matches shown of each; where the first right one is none of them, it stands behind them.
    """
    if task is None:
        return []
    first_Q = rank_queries(task.retrieval).first_Q
    return query_rows(shards, features, task, choose_queries(first_Q, count), first_Q, k)


def query_rows(
    shards: ShardSet, features: Features, task: Task, chosen: Sequence[int], first_Q: Tensor, k: int = 10
) -> list[SheetRow]:
    """Sheet rows of these queries of a task; see `ranked_rows`.

    Args:
        shards: as there.
        features: as there; only rows and captions are read.
        task: one of its tasks.
        chosen: positions of queries.
        first_Q: `QueryRanks.first_Q` of all of them.
        k: matches shown of each.
    """
    device = task.retrieval.query_pid_Q.device
    picked = task.retrieval.only(torch.tensor(chosen, dtype=torch.int64, device=device))
    index_QK, score_QK = top_matches(picked, k)
    queries, entries = _shown(shards, features, task)
    rows = []
    for q, query in enumerate(chosen):
        pid, first = int(picked.query_pid_Q[q]), int(first_Q[query])
        matches = [
            Match(entries(g), float(value), int(picked.gallery_pid_G[g]) == pid)
            for g, value in zip(index_QK[q].tolist(), score_QK[q].tolist(), strict=True)
            if g >= 0
        ]
        if first > k and type(task.retrieval) is Retrieval:  # re-ranked, its place in the list is not found so easily
            entry, value = nearest_positive(task.retrieval, query)
            matches.append(Match(entries(entry), value, True, first))
        rows.append(SheetRow(queries(query), f"first right one at rank {first}", matches))
    return rows


def nearest_positive(retrieval: Retrieval, query: int) -> tuple[int, float]:
    """The gallery entry that is the first right answer to a query by cosine, and the cosine.

    Args:
        retrieval: plain.
        query: position of one that has a positive.
    """
    one = retrieval.only(slice(query, query + 1))
    _, entry_E, kept_E = SameIdentity(one.gallery_pid_G, one.gallery_camid_G).pairs(one.query_pid_Q, one.query_camid_Q)
    entry_P = entry_E[kept_E]
    positive_PD = one.gallery_GD[entry_P.to(one.gallery_GD.device)].to(one.query_QD.device).float()
    cosine_P = nn.functional.cosine_similarity(positive_PD, one.query_QD.float())
    best = int(cosine_P.argmax())
    return int(entry_P[best]), float(cosine_P[best])


Shown = Callable[[int], "Image.Image | str"]


def _shown(shards: ShardSet, features: Features, task: Task) -> tuple[Shown, Shown]:
    """Of a query and of a gallery entry, by its position in the task, the image or the sentence."""

    def image(position: int) -> Image.Image:
        return stored_image(shards, int(features.row_N[position]))

    def sentence(position: int) -> str:
        return features.captions[position]

    of_query, of_entry = (sentence if task.kind == "t2i" else image), (sentence if task.kind == "i2t" else image)
    return lambda query: of_query(int(task.query_Q[query])), lambda entry: of_entry(int(task.gallery_G[entry]))


def stored_image(shards: ShardSet, row: int) -> Image.Image:
    """The image of a row in its stored size.

    Raises:
        UserError: it does not decode.
    """
    sample = shards.sample(row)
    pixels = decode_image(shards.image_bytes(row), (sample.height, sample.width), shards.describe(row))
    return Image.fromarray(pixels)


def choose_extremes(ap_Q: Tensor, positives_Q: Tensor, pid_Q: Tensor, count: int = 4) -> dict[str, list[int]]:
    """The best, the median and the worst queries by average precision, each list of different people.

    Args:
        ap_Q: `QueryRanks.ap_Q`.
        positives_Q: queries without any are left out; of equally good ones that with the most is the better one.
        pid_Q: identities of the queries.
        count: of each kind; fewer where there are fewer people.

    Returns:
        Positions of queries under "best", "median" (from easy to hard) and "worst" (the worst first).
    """
    valid = (positives_Q > 0).nonzero().flatten().tolist()
    ap, positives, pid = ap_Q.tolist(), positives_Q.tolist(), pid_Q.tolist()
    order = sorted(valid, key=lambda query: (-ap[query], -positives[query], query))
    middle = sorted(range(len(order)), key=lambda place: abs(2 * place + 1 - len(order)))
    found = {"best": order, "median": [order[place] for place in middle], "worst": order[::-1]}
    chosen = {name: _of_different_people(queries, pid, count) for name, queries in found.items()}
    place = {query: number for number, query in enumerate(order)}
    return {**chosen, "median": sorted(chosen["median"], key=lambda query: place[query])}


def _of_different_people(queries: Sequence[int], pid: Sequence[int], count: int) -> list[int]:
    """The first queries of so many people."""
    first: dict[int, int] = {}
    for query in queries:
        if len(first) == count:
            break
        first.setdefault(pid[query], query)
    return list(first.values())
