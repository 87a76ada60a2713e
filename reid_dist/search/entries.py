"""What an index knows of its photographs besides their vectors: file, person, camera, date.

Two files: `entries.jsonl`, one line for each photograph, and `columns.npy`, which says where each line begins and holds
person, camera and date as numbers, so that a filter over a million photographs parses none of them. `names.json` holds
the names behind the numbers. All three are written from the entries alone: what is deleted is in none of them.

Shape suffixes: N entries.
"""

import bisect
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from reid_dist.errors import UserError

ENTRIES_FILE, COLUMNS_FILE, NAMES_FILE = "entries.jsonl", "columns.npy", "names.json"
Rows = npt.NDArray[np.int64]

_COLUMNS = np.dtype([("offset", "<i8"), ("size", "<i4"), ("person", "<i4"), ("camera", "<i4"), ("date", "<i8")])
_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d))?)?)?)?")
_HIGHEST = (9999, 99, 99, 99, 99, 99)


@dataclass(frozen=True)
class Entry:
    """One photograph.

    Attributes:
        file: absolute path of the image; of a shard set `FOLDER::KEY`.
        version: what tells a changed file from the one that was indexed.
        person: whom it shows, where that is known.
        camera: that took it, where that is known.
        date: year, year-month, day, or day and time (`2024-05-31T16:20:05`), where that is known.
        time: seconds from the start of the video, of a frame.
        shards: location of the shard set; None for an image file.
        row: in the shard set.
        taken: date that the image file itself holds; `date` is this one where the source says none.
    """

    file: str
    version: str
    person: str | None = None
    camera: str | None = None
    date: str | None = None
    time: float | None = None
    shards: str | None = None
    row: int = -1
    taken: str | None = None


@dataclass(frozen=True)
class Filter:
    """Which photographs count; what is None lets all pass. An entry that lacks what is asked for does not pass.

    Attributes:
        person: exactly this one.
        camera: exactly this one.
        since: this date or later: `2024`, `2024-05`, `2024-05-31` or with a time.
        until: this date or earlier, the whole year, month or day included.
    """

    person: str | None = None
    camera: str | None = None
    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError where a date is none."""
        if self.since is not None:
            date_number(self.since)
        if self.until is not None:
            date_number(self.until, last=True)

    @property
    def empty(self) -> bool:
        """Whether every photograph passes."""
        return all(value is None for value in asdict(self).values())


def date_number(date: str, last: bool = False) -> int:
    """A date as a number that sorts as dates do: 20240531162005.

    Args:
        date: `2024`, `2024-05`, `2024-05-31`, `2024-05-31T16:20` or with seconds.
        last: the last moment of the year, month, day or minute instead of the first.

    Raises:
        UserError: it is none of these.
    """
    found = _DATE.fullmatch(date.strip())
    if found is None:
        raise UserError(f'date "{date[:40]}": not a date; write 2024, 2024-05, 2024-05-31 or 2024-05-31T16:20')
    lowest = (0, 0, 0, 0, 0, 0)
    parts = [int(part) if part else (_HIGHEST if last else lowest)[i] for i, part in enumerate(found.groups())]
    limits = ((1, 12), (1, 31), (0, 23), (0, 59), (0, 59))
    given = zip(parts[1:], limits, found.groups()[1:], strict=True)
    if any(part is not None and not least <= value <= most for value, (least, most), part in given):
        raise UserError(f'date "{date[:40]}": no such day or time; write dates as 2024-05-31')
    number = 0
    for part, digits in zip(parts, (4, 2, 2, 2, 2, 2), strict=True):
        number = number * 10**digits + part
    return number


class Entries(Sequence[Entry]):
    """The entries of an index in its order, parsed one by one when asked for.

    Attributes:
        persons: all names, sorted.
        cameras: all names, sorted.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the files of a folder whose hashes have been checked."""
        self._lines: npt.NDArray[np.uint8] = np.fromfile(folder / ENTRIES_FILE, dtype=np.uint8)
        self._column_N: npt.NDArray[Any] = np.load(folder / COLUMNS_FILE, allow_pickle=False)
        names = json.loads((folder / NAMES_FILE).read_text())
        self.persons: list[str] = names["persons"]
        self.cameras: list[str] = names["cameras"]

    def __len__(self) -> int:
        return len(self._column_N)

    def __getitem__(self, index: Any) -> Any:
        """The entry of a row, or the list of those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[int(index)]
        begin, size = int(self._column_N["offset"][row]), int(self._column_N["size"][row])
        return Entry(**json.loads(self._lines[begin : begin + size].tobytes()))

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def rows(self, where: Filter) -> Rows:
        """Rows that pass a filter, ascending."""
        pass_N = np.ones(len(self), dtype=bool)
        for key, names in (("person", self.persons), ("camera", self.cameras)):
            name = getattr(where, key)
            if name is not None:
                pass_N &= self._column_N[key] == _place(names, name)
        date_N = self._column_N["date"]
        if where.since is not None:
            pass_N &= date_N >= date_number(where.since)
        if where.until is not None:
            pass_N &= (date_N >= 0) & (date_N <= date_number(where.until, last=True))
        return np.flatnonzero(pass_N).astype(np.int64)


def _place(names: list[str], name: str) -> int:
    """Position in a sorted list; -2 for a name that it lacks, which no entry has."""
    place = bisect.bisect_left(names, name)
    return place if place < len(names) and names[place] == name else -2


def write_entries(folder: Path, entries: Iterable[Entry]) -> int:
    """Writes the three files into a folder that is not in use yet; may raise OSError.

    Returns:
        How many entries there are.
    """
    listed = list(entries)
    persons = sorted({entry.person for entry in listed if entry.person is not None})
    cameras = sorted({entry.camera for entry in listed if entry.camera is not None})
    places = ({name: i for i, name in enumerate(persons)}, {name: i for i, name in enumerate(cameras)})
    column_N = np.zeros(len(listed), dtype=_COLUMNS)
    with (folder / ENTRIES_FILE).open("wb") as file:
        for row, entry in enumerate(listed):
            column_N[row] = _write_line(file, entry, *places)
    with (folder / COLUMNS_FILE).open("wb") as file:
        np.save(file, column_N, allow_pickle=False)
    (folder / NAMES_FILE).write_text(json.dumps({"persons": persons, "cameras": cameras}))
    return len(listed)


def _write_line(file: IO[bytes], entry: Entry, persons: dict[str, int], cameras: dict[str, int]) -> tuple[int, ...]:
    line = entry_line(entry)
    begin = file.tell()
    file.write(line + b"\n")
    person = -1 if entry.person is None else persons[entry.person]
    camera = -1 if entry.camera is None else cameras[entry.camera]
    return begin, len(line), person, camera, -1 if entry.date is None else date_number(entry.date)


def entry_line(entry: Entry) -> bytes:
    """An entry as JSON without what is unknown."""
    defaults = {"row": -1}
    known = {key: value for key, value in asdict(entry).items() if value != defaults.get(key)}
    return json.dumps(known).encode()
