"""What `csv` and `jsonl` share: people in `images/`, each picture with everything that a row may tell."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Record, people_cards, people_log, put, shots_of
from shards.world.spec import QUERIES_PER_IDENTITY, ExportSpec


def write_table_unit(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    """Write the pictures of one identity and return their rows."""
    number, split, index = unit
    records = []
    for shot in shots_of(spec, split, index):
        captions = shot.captions()
        path = f"images/{number:06d}_{shot.position + 1:02d}.jpg"
        put(root, path, shot.picture.jpeg())
        row: Record = {"path": path, "pid": str(number), "camid": shot.camera, "split": split}
        if split != "train":
            query = split == "test" and shot.position < QUERIES_PER_IDENTITY
            row["role"] = "query" if query else "gallery"
        row["captions"] = [caption.text for caption in captions]
        records.append({"row": row, **shot.record(path, *captions)})
    return records


def table_log(spec: ExportSpec, records: list[Record]) -> dict[str, Any]:
    """Return what world.json tells of the people and their pictures."""
    return people_log(people_cards(spec), records)
