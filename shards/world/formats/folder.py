"""Anyone's own folders: `train/`, `val/`, `query/`, `gallery/`, one folder for each person, `_c<number>` in names."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, is_query, people_cards, people_log, people_units, put, shots_of
from shards.world.spec import ExportSpec


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    records = []
    for shot in shots_of(spec, split, index):
        folder = split
        if split == "test":
            folder = "query" if is_query(spec, split, shot) else "gallery"
        path = f"{folder}/person{number}/{shot.position:02d}_c{shot.camera}.jpg"
        put(root, path, shot.picture.jpeg())
        records.append(shot.record(path))
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    return people_log(people_cards(spec), records)


EXPORTER = Exporter(people_units, _write, _finish)
