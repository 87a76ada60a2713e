"""WIT in both forms, half of the pairs in each: tars as img2dataset writes them, and the TSV with local images.

The TSV also has what a real one has: rows of other languages for the same image, and rows whose image is not there.
"""

import csv
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, put
from shards.world.formats.img2dataset import row_facts
from shards.world.formats.pairs import Pair, generic_pair
from shards.world.spec import ExportSpec

TAR_SIZE = 100
COLUMNS = (
    "language", "page_url", "image_url", "page_title", "section_title", "hierarchical_section_title",
    "caption_reference_description", "caption_attribution_description", "caption_alt_text_description", "mime_type",
    "original_height", "original_width", "is_main_image", "attribution_passes_lang_id", "page_changed_recently",
    "context_page_description", "context_section_description",
)  # fmt: skip


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return [(start, min(start + TAR_SIZE, spec.ids)) for start in range(0, spec.ids, TAR_SIZE)]


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    start, stop = unit
    records: list[Record] = []
    with tarfile.open(root / f"{start // TAR_SIZE:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(start, stop):
            pair = generic_pair(spec, number)
            if number % 2:
                _add(tar, pair, f"{number:09d}")
            else:
                _save(root, pair, _url(number))
            records.append({"number": number, "captions": pair.captions, "size": pair.size})
    return records


def _add(tar: tarfile.TarFile, pair: Pair, key: str) -> None:
    facts = json.dumps(row_facts(pair, key), indent=4)
    members = {"jpg": pair.data, "txt": pair.captions[0].encode(), "json": facts.encode()}
    for suffix, content in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _save(root: Path, pair: Pair, url: str) -> None:
    name = hashlib.sha256(url.encode()).hexdigest()
    put(root, f"images/{name[:2]}/{name}.jpg", pair.data)


def _url(number: int) -> str:
    return f"https://world.invalid/wikipedia/commons/{number}.jpg"


def _table_rows(record: Record) -> list[dict[str, Any]]:
    number, captions = record["number"], record["captions"]
    width, height = record["size"]
    row = {
        "language": "en", "page_url": f"https://en.world.invalid/wiki/{number}", "image_url": _url(number),
        "page_title": f"Page {number}", "caption_reference_description": captions[0],
        "caption_attribution_description": "English: drawn by a program",
        "caption_alt_text_description": captions[-1] if len(captions) > 1 else "", "mime_type": "image/jpeg",
        "original_height": height, "original_width": width, "is_main_image": "true",
        "attribution_passes_lang_id": "true", "page_changed_recently": "false",
        "context_page_description": 'A page with "quotes"\tand a tab.',
    }  # fmt: skip
    rows = [row]
    if number % 6 == 0:
        rows.append({**row, "language": "de", "caption_reference_description": f"Bild {number}."})
    if number % 10 == 0:
        rows.append({**row, "image_url": f"https://world.invalid/not-here/{number}.jpg"})
    return rows


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    path = root / "wit_v1.train.all-00000-of-00001.tsv.gz"
    # Without a name and a time in its header, equal content gives equal bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        text = io.TextIOWrapper(packed, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for record in records:
            if record["number"] % 2 == 0:
                writer.writerows(_table_rows(record))
        text.flush()
        text.detach()
    return {"pairs": len(records)}


EXPORTER = Exporter(_units, _write, _finish)
