"""One's own data as `jsonl`: every `*.jsonl` directly in the root, one JSON object a line, in UTF-8.

Keys:

    path       of the image, relative to the root; the only one that must be there
    pid        identity, a text or a number; without it every image is its own
    camid      camera, a number from 0
    split      "train" (default), "val" or "test"
    role       in val and test: "gallery" (default), "query", "distractor" or "junk"
    caption    a sentence
    captions   a list of sentences

A path may stand in several lines; each adds its captions.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.forms.annotation import bounded_lines, unique_keys, validated
from shards.forms.table import Row, table_samples, tables_in
from shards.raw import Counts, RawSample

CARD: dict[str, Any] = {
    "title": "own data (jsonl)",
    "licence": "that of its owner",
    "consent": "for its owner to state",
    "source": "local",
    "citation": "none",
}

EXPECTED: dict[str, dict[str, Counts]] = {"standard": {}}

_REMEDY = f"correct the line; known keys are {', '.join(Row.model_fields)}"
_MAX_LINE = 1_000_000


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of their first lines.

    Args:
        root: folder with one or more `*.jsonl`.
        variant: there is one.

    Raises:
        UserError: no file, a line that is not JSON, an unknown key or a value of another type, a missing image;
            names file and line.
    """
    yield from table_samples(root, (row for path in tables_in(root, ".jsonl") for row in _rows(path)))


def part(sample: RawSample) -> str:
    """Counted per split."""
    return sample.split


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(bounded_lines(file, str(path), _MAX_LINE), start=1):
            if not line.strip():
                continue
            origin = f"{path}: line {number}"
            try:
                content = json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{origin}: not JSON ({str(error)[:200]}); {_REMEDY}") from None
            yield origin, validated(Row, content, origin, _REMEDY)
