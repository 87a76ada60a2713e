"""Expectations over tied images against full enumeration of their orders."""

import random
from fractions import Fraction
from itertools import combinations, product
from statistics import mean

import pytest

from shards.world.ties import METRICS, RANKS, Ranking, Tie, expected_metrics, mean_metrics, ranking


def metrics_of(hits: list[bool]) -> dict[str, Fraction]:
    """Return the metrics of one order, by their definitions."""
    places = [place for place, hit in enumerate(hits, start=1) if hit]
    found = {f"R{rank}": Fraction(places[0] <= rank) for rank in RANKS}
    found["mAP"] = sum((Fraction(hit, place) for hit, place in enumerate(places, start=1)), Fraction()) / len(places)
    found["mINP"] = Fraction(len(places), places[-1])
    return found


def enumerated(ties: Ranking) -> dict[str, float]:
    """Return the means over every placing of the positives inside their ties: as likely as each other."""
    parts = [
        [[place in chosen for place in range(tie.size)] for chosen in combinations(range(tie.size), tie.positives)]
        for tie in ties
    ]
    orders = [metrics_of([hit for part in order for hit in part]) for order in product(*parts)]
    return {name: float(sum(order[name] for order in orders) / len(orders)) for name in METRICS}


@pytest.mark.parametrize(
    "ties",
    [
        (Tie(1, 1),),
        (Tie(6, 1),),
        (Tie(6, 3),),
        (Tie(7, 7),),
        (Tie(3, 0), Tie(6, 2)),
        (Tie(9, 0), Tie(5, 2)),
        (Tie(12, 0), Tie(4, 1)),
        (Tie(3, 1), Tie(4, 2)),
        (Tie(2, 2), Tie(5, 0), Tie(4, 1)),
        (Tie(1, 0), Tie(4, 1), Tie(3, 0), Tie(5, 3), Tie(2, 2)),
        (Tie(6, 2), Tie(6, 2), Tie(3, 1)),
    ],
)
def test_closed_forms_equal_enumeration(ties: Ranking) -> None:
    assert expected_metrics(ties) == pytest.approx(enumerated(ties), abs=1e-12)


def test_random_ties_equal_enumeration() -> None:
    draw = random.Random(4)
    for _ in range(60):
        sizes = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        ties = tuple(Tie(size, draw.randint(0, size)) for size in sizes)
        if any(tie.positives for tie in ties):
            assert expected_metrics(ties) == pytest.approx(enumerated(ties), abs=1e-12), ties


def test_the_formula_holds_for_large_ties() -> None:
    found = expected_metrics((Tie(5000, 40),))
    assert found["R1"] == pytest.approx(40 / 5000) and 0 < found["mINP"] < found["mAP"] < found["R10"] < 1


def test_ranking_groups_by_key_and_drops_what_follows_the_last_positive() -> None:
    keys = [(1, 0), (0, 0), (0, 2), (0, 0), (2, 0), (1, 0)]
    assert ranking(keys, [True, False, False, True, False, False]) == (Tie(2, 1), Tie(1, 0), Tie(2, 1))


def test_mean_is_in_percent() -> None:
    rankings = [(Tie(2, 1),), (Tie(1, 1),), (Tie(2, 1),)]
    found = mean_metrics(rankings)
    assert found["R1"] == pytest.approx(100 * mean([0.5, 1, 0.5])) and found["queries"] == 3
