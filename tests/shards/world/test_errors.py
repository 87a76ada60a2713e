"""Errors by attribute, counted by hand and on a world's own families."""

from collections import Counter
from dataclasses import asdict

import pytest

from shards.world.errors import SEVERAL, STRANGER, errors_by_attribute
from shards.world.spec import World


def _card(key: int, family: int, diff: str | None, split: str = "test") -> dict[str, object]:
    return {"key": key, "family": family, "diff": diff, "split": split}


CARDS = {
    "1": _card(1, 0, None),
    "2": _card(2, 0, "bag"),
    "3": _card(3, 0, "hat_colour"),
    "4": _card(4, 0, "bag"),
    "5": _card(5, 1, None),
    "6": _card(6, 0, None, "val"),
}


def test_shares_by_hand() -> None:
    matches = [
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
        ("2", "4"),
        ("2", "3"),
        ("3", "1"),
        ("5", "1"),
        ("5", "0"),
        ("1", "6"),
    ]
    found = errors_by_attribute(CARDS, matches)
    assert (found.queries, found.errors) == (9, 8)
    assert found.share == {"bag": 3 / 8, SEVERAL: 1 / 8, "hat_colour": 1 / 8, STRANGER: 3 / 8}
    assert sum(found.share.values()) == pytest.approx(1)
    # Persons 1 (three queries) and 2 (three) can be taken for one that differs in the bag alone; 1 and 3 in the hat.
    assert found.rate == {"bag": 3 / 6, "hat_colour": 1 / 4}


def test_no_error_and_no_query() -> None:
    assert errors_by_attribute(CARDS, [("1", "1")]).share == {}
    assert asdict(errors_by_attribute(CARDS, [])) == {"queries": 0, "errors": 0, "share": {}, "rate": {}}


def test_a_query_of_an_unknown_person_is_refused() -> None:
    with pytest.raises(KeyError):
        errors_by_attribute(CARDS, [("77", "1")])


def test_a_reader_blind_to_one_attribute_errs_in_it_alone() -> None:
    world = World(2, 0.0, 3, 0.7, 0.0)
    people = {str(index): world.identity("test", index) for index in range(80)}
    cards = {
        number: {"key": one.key, "family": one.family, "diff": one.diff, "split": one.split}
        for number, one in people.items()
    }
    blind = Counter(one.diff for one in people.values() if one.diff).most_common(1)[0][0]

    def look(number: str) -> tuple[str, ...]:
        return tuple(value for name, value in people[number].attributes.items() if name != blind)

    matches = [(number, next(other for other in people if look(other) == look(number))) for number in people]
    found = errors_by_attribute(cards, matches)
    assert found.errors > 0 and found.share == {blind: 1.0}
    assert 0 < found.rate[blind] <= 1 and all(rate == 0 for name, rate in found.rate.items() if name != blind)
