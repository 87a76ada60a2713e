"""Where a model errs: the scores of queries by camera and by attribute, and what its wrong first answers are.

Not collectives: one process computes them.

Shape suffixes: Q queries, W queries whose first answer is wrong, G gallery entries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from reid_dist.evaluation.benchmark import Task, TaskResult
from reid_dist.evaluation.ranking import QueryRanks, top_matches

# Each costs a pass over the gallery.
MOST_WRONG = 2_000
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Group:
    """Scores of some of the queries.

    Attributes:
        queries: how many have a positive.
        rank1: percent of them with a right first answer.
        mean_ap: percent.
    """

    queries: int
    rank1: float
    mean_ap: float


def by_key(ranks: QueryRanks, key_Q: Sequence[Key | None]) -> dict[Key, Group]:
    """Scores of the queries of each key, in the order of their first appearance; queries of key None are left out."""
    places: dict[Key, list[int]] = {}
    for place, (key, positives) in enumerate(zip(key_Q, ranks.positives_Q.tolist(), strict=True)):
        if key is not None and positives:
            places.setdefault(key, []).append(place)
    first, ap = ranks.first_Q.tolist(), ranks.ap_Q.tolist()
    return {
        key: Group(
            len(found),
            100.0 * sum(first[place] == 1 for place in found) / len(found),
            100.0 * math.fsum(ap[place] for place in found) / len(found),
        )
        for key, found in places.items()
    }


def by_camera(result: TaskResult) -> dict[int, Group]:
    """Scores of the queries of each camera, ascending; -1 is unknown. Of a task without cameras: none."""
    camid_Q = result.task.retrieval.query_camid_Q
    return {} if camid_Q is None else dict(sorted(by_key(result.ranks, camid_Q.tolist()).items()))


@dataclass(frozen=True)
class Mistakes:
    """Wrong first answers.

    Attributes:
        query_W: positions of queries.
        gallery_W: the gallery entry that each got first.
        total: how many first answers are wrong; where it is more than W, these are evenly spread among them.
    """

    query_W: Tensor
    gallery_W: Tensor
    total: int


def find_mistakes(result: TaskResult, most: int = MOST_WRONG) -> Mistakes:
    """The wrong first answers, of at most so many queries."""
    wrong_W = (result.ranks.first_Q > 1).nonzero().flatten()
    total = len(wrong_W)
    if total > most:
        wrong_W = wrong_W[torch.arange(most, device=wrong_W.device) * total // most]
    if not total:
        return Mistakes(wrong_W, wrong_W, 0)
    retrieval = result.task.retrieval
    found_W1, _ = top_matches(retrieval.only(wrong_W.to(retrieval.query_QD.device)), 1)
    return Mistakes(wrong_W, found_W1[:, 0], total)


def mistaken_cameras(task: Task, mistakes: Mistakes) -> dict[tuple[int, int], int]:
    """How many of the wrong first answers are of each (camera of the query, camera of the answer)."""
    query_camid_Q, gallery_camid_G = task.retrieval.query_camid_Q, task.retrieval.gallery_camid_G
    if query_camid_Q is None or gallery_camid_G is None:
        return {}
    asked = query_camid_Q[mistakes.query_W].tolist()
    return dict(Counter(zip(asked, gallery_camid_G[mistakes.gallery_W].tolist(), strict=True)))


Facts = Mapping[str, str]


def by_attribute(result: TaskResult, facts: Mapping[int, Facts]) -> dict[str, dict[str, Group]]:
    """Scores by attribute and its value: of the queries whose person has it.

    Args:
        result: of any task.
        facts: attributes of identities, by their number in the task's retrieval; of some identities at least.
    """
    pid_Q = result.task.retrieval.query_pid_Q.tolist()
    return {
        name: dict(sorted(by_key(result.ranks, [facts.get(pid, {}).get(name) for pid in pid_Q]).items()))
        for name in _names(facts.values())
    }


@dataclass(frozen=True)
class Difference:
    """How often two people differ in an attribute.

    Attributes:
        mistaken: percent of the wrong first answers that differ from the one asked for.
        random: percent of all wrong answers that the gallery has for the same queries: what blind mistakes would give.
    """

    mistaken: float
    random: float


def mistaken_attributes(
    task: Task, mistakes: Mistakes, facts: Mapping[int, Facts]
) -> tuple[dict[str, Difference], int]:
    """What the wrong first answers are wrong in.

    Returns:
        By attribute; and how many wrong first answers that is of, for of some people nothing is known.
    """
    pid_G = task.retrieval.gallery_pid_G.tolist()
    asked = task.retrieval.query_pid_Q[mistakes.query_W].tolist()
    found = [pid_G[place] for place in mistakes.gallery_W.tolist()]
    pairs = [(a, b) for a, b in zip(asked, found, strict=True) if a in facts and b in facts]
    if not pairs:
        return {}, 0
    entries = Counter(pid for pid in pid_G if pid in facts)
    return {name: _difference(name, pairs, entries, facts) for name in _names(facts.values())}, len(pairs)


def _difference(
    name: str, pairs: Sequence[tuple[int, int]], entries: Mapping[int, int], facts: Mapping[int, Facts]
) -> Difference:
    value = {pid: facts[pid].get(name) for pid in {*entries, *(pid for pair in pairs for pid in pair)}}
    entries_of: Counter[str | None] = Counter()
    for pid, count in entries.items():
        entries_of[value[pid]] += count
    total, others, differing = sum(entries.values()), 0, 0
    for asked, _ in pairs:
        others += total - entries.get(asked, 0)
        differing += total - entries_of[value[asked]]
    mistaken = sum(value[asked] != value[found] for asked, found in pairs)
    return Difference(100.0 * mistaken / len(pairs), 100.0 * differing / others)


def _names(facts: Iterable[Facts]) -> list[str]:
    return sorted({name for fact in facts for name in fact})


def known_facts(identities: Sequence[str], attributes: Mapping[str, Facts]) -> dict[int, Facts]:
    """Attributes by the number of an identity instead of its name."""
    return {number: attributes[pid] for number, pid in enumerate(identities) if pid in attributes}
