"""The oracle's closed forms against enumeration, and its rules on small worlds."""

from itertools import permutations
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards.world.oracle import (
    TieGroup,
    expected_metrics,
    image_ceiling,
    read_world,
    text_ceiling,
    violations,
)


def _enumerated(group: TieGroup) -> dict[str, float]:
    sums = dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), 0.0)
    orders = list(permutations(range(group.size)))
    for order in orders:
        places = sorted(group.ahead + place + 1 for place, item in enumerate(order) if item < group.positives)
        for rank in (1, 5, 10):
            sums[f"R{rank}"] += places[0] <= rank
        sums["mAP"] += sum((hit + 1) / place for hit, place in enumerate(places)) / len(places)
        sums["mINP"] += len(places) / places[-1]
    return {name: value / len(orders) for name, value in sums.items()}


@pytest.mark.parametrize(
    ("ahead", "size", "positives"),
    [(0, 1, 1), (0, 6, 1), (0, 6, 3), (0, 7, 7), (3, 6, 2), (4, 7, 2), (9, 5, 2), (12, 4, 1)],
)
def test_closed_forms_equal_enumeration(ahead: int, size: int, positives: int) -> None:
    group = TieGroup(ahead, size, positives)
    assert expected_metrics(group) == pytest.approx(_enumerated(group), abs=1e-12)


def _tree(attributes: dict[str, dict[str, str]], **more: object) -> dict[str, object]:
    cards = {number: {"split": "test", "attributes": values} for number, values in attributes.items()}
    return {"identities": cards, **more}


BASE = {"pattern": "plain", "hair": "bald", "bag": "none", "hat": "none", "upper_colour": "red"}


def test_text_ceiling_ties_the_identities_that_agree() -> None:
    people = {"1": BASE, "2": {**BASE, "upper_colour": "blue"}}
    shots = {f"test_query/p{number}_s{shot}.jpg": [0, 0, "front"] for number in (1, 2) for shot in (1, 2)}
    mentions = {path: [[["hair", "bald"]], [["upper_colour", "red" if "p1" in path else "blue"]]] for path in shots}
    result = text_ceiling(_tree(people, shots=shots, mentions=mentions))
    assert result["queries"] == 8
    assert result["R1"] == pytest.approx(75.0)
    assert set(result) == {"R1", "R5", "R10", "mAP", "mINP", "queries"}


def test_image_ceiling_follows_the_market_rules() -> None:
    people = {"1": BASE, "2": {**BASE, "upper_colour": "blue"}}
    shots = {
        "query/0001_c1s1_000000_00.jpg": [0, 0, "front"],
        "query/0002_c1s1_000000_00.jpg": [0, 0, "front"],
        "bounding_box_test/0001_c1s1_000001_01.jpg": [0, 1, "front"],
        "bounding_box_test/0001_c2s1_000001_02.jpg": [1, 0, "front"],
        "bounding_box_test/0002_c1s1_000001_01.jpg": [0, 1, "front"],
        "bounding_box_test/0000_c3s1_000001_01.jpg": [2, 0, "front"],
        "bounding_box_test/-1_c3s1_000001_01.jpg": [2, 0, "front"],
    }
    strangers = {path: {"attributes": BASE} for path in shots if "/0000" in path or "/-1" in path}
    result = image_ceiling(_tree(people, shots=shots, strangers=strangers))
    # Query 1: its own camera dropped, junk dropped, the distractor looks the same: 1 positive of 2 tied.
    # Query 2 has no positive on another camera and is left out.
    assert result["queries"] == 1
    assert result["R1"] == pytest.approx(50.0)
    assert result["mAP"] == pytest.approx(75.0)


def test_violations() -> None:
    assert violations([["upper_colour", "red"], ["bag", "none"]], BASE) == 0
    assert violations([["upper_colour", "blue"], ["bag", "none"]], BASE) == 1


def test_missing_or_wrong_tree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not there"):
        read_world(tmp_path, "cuhk_pedes")
    (tmp_path / "world.json").write_text('{"parameters": {"format": "market1501"}}')
    with pytest.raises(UserError, match="holds a market1501 tree"):
        read_world(tmp_path, "cuhk_pedes")
