"""Entries and filters: the files against the list that was written, filters against a loop over it."""

import itertools
import random
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from reid_dist.search.entries import Entries, Entry, Filter, date_number, write_entries

DATES = [None, "2023", "2024-05", "2024-05-31", "2024-05-31T16:20", "2024-05-31T16:20:05", "2024-06-01"]


def some_entries(count: int, seed: int = 0) -> list[Entry]:
    draw = random.Random(seed)
    people, cameras = [None, "Ann", "Bo", "Čeněk", "Ann "], [None, "1", "10", "2"]
    return [
        Entry(
            f"/photos/ä {i}.jpg", str(i), draw.choice(people), draw.choice(cameras), draw.choice(DATES), i / 2 or None
        )
        for i in range(count)
    ]


def passes(entry: Entry, where: Filter) -> bool:
    """The rule in other words: dates compared as texts, filled up."""
    fill = "-00-00T00:00:00", "-99-99T99:99:99"

    def filled(date: str, last: bool) -> str:
        return date + fill[last][len(date) - 4 :]

    if where.person is not None and entry.person != where.person:
        return False
    if where.camera is not None and entry.camera != where.camera:
        return False
    if where.since is not None and (entry.date is None or filled(entry.date, False) < filled(where.since, False)):
        return False
    return where.until is None or (entry.date is not None and filled(entry.date, False) <= filled(where.until, True))


@pytest.mark.parametrize("count", [0, 1, 57])
def test_what_is_written_is_read_and_filters_are_a_loop(count: int, tmp_path: Path) -> None:
    listed = some_entries(count)
    write_entries(tmp_path, listed)
    entries = Entries(tmp_path)
    assert list(entries) == listed and entries[: count // 2] == listed[: count // 2]
    assert entries.persons == sorted({e.person for e in listed if e.person is not None})
    for person, camera, since, until in itertools.product(
        [None, "Ann", "nobody", ""], [None, "1", "3"], DATES, [None, "2023", "2024-05", "2024-05-31T16:20"]
    ):
        where = Filter(person, camera, since, until)
        assert entries.rows(where).tolist() == [i for i, entry in enumerate(listed) if passes(entry, where)], where


def test_a_row_outside_is_an_error_and_negative_rows_count_from_the_end(tmp_path: Path) -> None:
    write_entries(tmp_path, some_entries(3))
    entries = Entries(tmp_path)
    assert entries[-1] == entries[2]
    with pytest.raises(IndexError):
        entries[3]


def test_dates_sort_as_numbers_and_others_are_refused() -> None:
    assert date_number("2024-05-31T16:20:05") == 20240531162005
    assert date_number("2024") == 20240000000000 < date_number("2024-01-01") < date_number("2024", last=True)
    for wrong in ("", "31.5.2024", "2024-13", "2024-00-10", "2024-05-32", "20240531", "2024-05-31T25:00", "2024-1-1"):
        with pytest.raises(UserError, match=r"not a date|no such"):
            date_number(wrong)
    with pytest.raises(UserError, match='date "yesterday"'):
        Filter(since="yesterday")


def test_names_of_nobody_left_are_gone(tmp_path: Path) -> None:
    write_entries(tmp_path, [Entry("/a.jpg", "1", "Ann"), Entry("/b.jpg", "1", "Bo")])
    write_entries(tmp_path, [Entry("/a.jpg", "1", "Ann")])
    assert b"Bo" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
