"""Exact ceiling: the expected metrics of a reader who knows every attribute, ties in uniformly random order."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.world.identity import effective

RANKS = (1, 5, 10)
METRICS = ("R1", "R5", "R10", "mAP", "mINP")


@dataclass(frozen=True)
class TieGroup:
    """The tied images among which a query's positives lie.

    Attributes:
        ahead: Images ranked strictly before the group, none of them positive.
        size: Images in the group.
        positives: Positives in the group (all positives of the query).
    """

    ahead: int
    size: int
    positives: int


def expected_metrics(group: TieGroup) -> dict[str, float]:
    """Return the expectation of each metric over the orders of the group, as shares.

    With n tied images, r positives and m images ahead: R@K = 1 - C(n - K + m, r) / C(n, r);
    E[AP] = 1/n * sum_k (1 + (k-1)(r-1)/(n-1)) / (m + k), since every place k holds a positive with probability r/n and
    then (k-1)(r-1)/(n-1) positives are expected before it; E[INP] = sum_l r / (m + l) * C(l-1, r-1) / C(n, r), l being
    the place of the last positive.
    """
    ahead, n, r = group.ahead, group.size, group.positives
    orders = comb(n, r)
    result = {f"R{rank}": 1.0 - comb(max(n - max(rank - ahead, 0), 0), r) / orders for rank in RANKS}
    slope = (r - 1) / (n - 1) if n > 1 else 0.0
    result["mAP"] = sum((1 + (k - 1) * slope) / (ahead + k) for k in range(1, n + 1)) / n
    result["mINP"] = sum(r / (ahead + last) * comb(last - 1, r - 1) for last in range(r, n + 1)) / orders
    return result


def _mean(groups: Iterable[TieGroup]) -> dict[str, float]:
    """Return the mean metrics in percent and the number of queries."""
    cache: dict[TieGroup, dict[str, float]] = {}
    sums = dict.fromkeys(METRICS, 0.0)
    queries = 0
    for group in groups:
        if group not in cache:
            cache[group] = expected_metrics(group)
        queries += 1
        for name in METRICS:
            sums[name] += cache[group][name]
    scale = 100.0 / max(queries, 1)
    return {**{name: value * scale for name, value in sums.items()}, "queries": float(queries)}


def violations(mentions: Sequence[Sequence[str]], seen: Mapping[str, str]) -> int:
    """Return how many mentions an identity contradicts (0 for the right one unless a word is wrong)."""
    return sum(seen[name] != value for name, value in mentions)


def text_ceiling(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return the T2I ceiling from the world.json of a CUHK-PEDES tree: all test captions against all test images."""
    seen, images = _test_people(tree)
    groups = []
    for path, captions in tree["mentions"].items():
        number = _number_of(path)
        if number not in seen:
            continue
        for mentions in captions:
            groups.append(_group(number, {other: violations(mentions, seen[other]) for other in seen}, images))
    return _mean(groups)


def _number_of(path: str) -> str:
    return path.rsplit("/", 1)[-1].split("_", 1)[0][1:]


def _test_people(tree: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    people = {number: card for number, card in tree["identities"].items() if card["split"] == "test"}
    seen = {number: effective(card["attributes"]) for number, card in people.items()}
    images = dict.fromkeys(people, 0)
    for path in tree["shots"]:
        if _number_of(path) in images:
            images[_number_of(path)] += 1
    return seen, images


def _group(number: str, wrong: Mapping[str, int], images: Mapping[str, int]) -> TieGroup:
    own = wrong[number]
    ahead = sum(images[other] for other, count in wrong.items() if count < own)
    size = sum(images[other] for other, count in wrong.items() if count == own)
    return TieGroup(ahead, size, images[number])


def image_ceiling(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return the I2I ceiling from the world.json of a Market-1501 tree under the Market rules.

    Same identity seen by the same camera is left out, junk is left out, distractors stay; images of people with
    exactly the query's attributes are tied first. Queries without a positive are left out.
    """
    vectors: dict[str, tuple[tuple[str, str], ...]] = {}
    for number, card in tree["identities"].items():
        vectors[number] = tuple(sorted(effective(card["attributes"]).items()))
    gallery: list[tuple[str, int, tuple[tuple[str, str], ...]]] = []
    queries: list[tuple[str, int]] = []
    for path, shot in tree["shots"].items():
        folder, name = path.split("/", 1)
        number = str(int(name.split("_", 1)[0]))
        if folder == "query":
            queries.append((number, shot[0]))
        elif folder == "bounding_box_test" and number != "-1":
            stranger = tree["strangers"].get(path)
            vector = vectors[number] if stranger is None else tuple(sorted(effective(stranger["attributes"]).items()))
            gallery.append((number, shot[0], vector))
    groups = []
    for number, camera in queries:
        alike = [(other, cam) for other, cam, vector in gallery if vector == vectors[number]]
        tied = [(other, cam) for other, cam in alike if not (other == number and cam == camera)]
        positives = sum(other == number for other, _ in tied)
        if positives:
            groups.append(TieGroup(0, len(tied), positives))
    return _mean(groups)


def read_world(root: Path, wanted: str) -> dict[str, Any]:
    """Return the world.json of a tree of the wanted format.

    Raises:
        UserError: It is absent, unreadable or of another format.
    """
    path = root / "world.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = tree["parameters"]["format"]
    except OSError:
        raise UserError(f"{path}: not there; name a tree written by `python -m shards.world export {wanted}`") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read; export the tree again") from None
    if found != wanted:
        raise UserError(f"{path}: holds a {found} tree, a {wanted} tree is needed here")
    return dict(tree)


def ceilings(cuhk_root: Path, market_root: Path) -> dict[str, dict[str, float]]:
    """Return the oracle of both query kinds, metrics in percent."""
    text = text_ceiling(read_world(cuhk_root, "cuhk_pedes"))
    return {"t2i": text, "i2i": image_ceiling(read_world(market_root, "market1501"))}
