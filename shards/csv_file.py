"""One's own data as `csv`: every `*.csv` directly in the root, with a header, commas, in UTF-8.

Columns, in any order:

    path                     of the image, relative to the root; the only one that must be there
    pid                      identity; without it every image is its own
    camid                    camera, a number from 0
    split                    train (default), val or test
    role                     in val and test: gallery (default), query, distractor or junk
    caption, caption1, ...   a sentence each

An empty cell is the same as no such column. A path may stand in several rows; each adds its captions.
"""

import csv
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.forms.annotation import bounded_lines, validated
from shards.forms.table import Row, table_samples, tables_in
from shards.raw import Counts, RawSample

CARD: dict[str, Any] = {
    "title": "own data (csv)",
    "licence": "that of its owner",
    "consent": "for its owner to state",
    "source": "local",
    "citation": "none",
}

EXPECTED: dict[str, dict[str, Counts]] = {"standard": {}}

COLUMNS = ("path", "pid", "camid", "split", "role", "caption")
_KNOWN = ", ".join(COLUMNS) + ", caption1, ..."
_CAPTION = re.compile(r"caption\d{0,4}")
_NUMBER = re.compile(r"-?\d{1,10}")
_REMEDY = "correct the cell"
_MAX_LINE = 1_000_000


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of their first rows.

    Args:
        root: folder with one or more `*.csv`.
        variant: there is one.

    Raises:
        UserError: no table, an unknown column, a row of another length or with a cell of another form, a missing
            image; names file and line.
    """
    yield from table_samples(root, (row for path in tables_in(root, ".csv") for row in _rows(path)))


def part(sample: RawSample) -> str:
    """Counted per split."""
    return sample.split


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_MAX_LINE)
    # utf-8-sig: spreadsheets put a mark before the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(bounded_lines(file, str(path), _MAX_LINE), strict=True)
        try:
            header = _checked_header(next(reader, []), path)
            for cells in reader:
                if cells:
                    origin = f"{path}: line {reader.line_num}"
                    yield origin, _row(header, cells, origin)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: {error}; correct its quotes and commas") from None


def _checked_header(header: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in header]
    for name in names:
        if name not in COLUMNS and not _CAPTION.fullmatch(name):
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            offer = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{path}: line 1: unknown column {name[:100]!r}; {offer}There are {_KNOWN}")
        if names.count(name) > 1:
            raise UserError(f"{path}: line 1: the column {name!r} occurs twice; rename or remove one")
    if "path" not in names:
        raise UserError(f"{path}: line 1: no column path; the first line names the columns: {_KNOWN}")
    return names


def _row(header: list[str], cells: list[str], origin: str) -> Row:
    if len(cells) != len(header):
        raise UserError(f"{origin}: {len(cells)} cells instead of {len(header)}; quote cells that hold commas")
    filled = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
    values: dict[str, Any] = {name: cell for name, cell in filled.items() if not _CAPTION.fullmatch(name)}
    values["captions"] = [cell for name, cell in filled.items() if _CAPTION.fullmatch(name)]
    if _NUMBER.fullmatch(values.get("camid", "")):
        values["camid"] = int(values["camid"])
    return validated(Row, values, origin, _REMEDY)
