"""What a query found: as a table, as JSON, as a contact sheet."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from reid_dist.errors import UserError
from reid_dist.report.sheet import THUMB_H, THUMB_W, Match, SheetRow, contact_sheet
from reid_dist.search.entries import Entry
from reid_dist.search.index import Hit, PhotoIndex, unknown

_LEGEND = "thick green frame: known   thin red frame: below the threshold   below: rank and cosine"
_GREY = (160, 160, 160)
_HEAD = ("", "score", "person", "camera", "date", "file")


def hit_table(hits: Sequence[Hit], threshold: float | None) -> str:
    """Hits as aligned columns; where the best is below the threshold the last line says so."""
    rows = [_HEAD, *(_cells(number, hit) for number, hit in enumerate(hits, start=1))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    if not hits:
        lines = ["no photograph passes the filter"]
    if threshold is not None and unknown(hits, threshold):
        lines.append(f"unknown: the best score {hits[0].score:.3f} is below the threshold {threshold:.3f}")
    return "\n".join(lines)


def _cells(number: int, hit: Hit) -> tuple[str, ...]:
    entry = hit.entry
    known = [entry.person or "-", entry.camera or "-", entry.date or "-"]
    # A file's name may hold anything: what steers a terminal is shown, not sent.
    return tuple(
        cell if cell.isprintable() else repr(cell)[1:-1]
        for cell in (str(number), f"{hit.score:.3f}", *known, entry.file)
    )


def hit_record(
    index: PhotoIndex, query: dict[str, Any], hits: Sequence[Hit], threshold: float | None
) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "index": str(index.folder),
        "model": index.digest,
        "query": query,
        "threshold": threshold,
        "unknown": unknown(hits, threshold),
        "hits": [{"rank": rank, "score": hit.score, **_known(hit.entry)} for rank, hit in enumerate(hits, start=1)],
    }


def _known(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in asdict(entry).items() if key in ("file", "person", "camera", "date", "time")}


def write_sheet(
    path: Path,
    index: PhotoIndex,
    text: str | None,
    image: Image.Image | None,
    hits: Sequence[Hit],
    threshold: float | None,
) -> None:
    """Writes a PNG of the query and what it found; frames are green from the threshold on.

    A photograph that is gone or does not decode is a grey tile, with a note on stderr.
    """
    matches = [Match(_tile(index, hit.entry), hit.score, threshold is None or hit.score >= threshold) for hit in hits]
    row = SheetRow(image if image is not None else text or "", text or "" if image is not None else "", matches)
    contact_sheet(path, f"{index.folder.name}: {len(index.entries)} photographs", [row], _LEGEND)


def _tile(index: PhotoIndex, entry: Entry) -> Image.Image:
    try:
        return index.thumbnail(entry)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
        return Image.new("RGB", (THUMB_W, THUMB_H), _GREY)
