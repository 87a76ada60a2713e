"""MSMT17 V1: `train/`, `test/` and the four lists; the numbers of test people begin at 0 again.

`list_val.txt` holds the last picture of every training person.
"""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, is_query, people_cards, people_log, people_units, put, shots_of
from shards.world.spec import ExportSpec

_SPLITS = ("train", "test")
LISTS = ("train", "val", "query", "gallery")


def image_name(person: int, position: int, camera: int) -> str:
    """Return a file name such as 0000_045_12_0303morning_0006_2.jpg; some real ones end in `_ex`, so do ours."""
    extended = "_ex" if position % 3 == 1 else ""
    return f"{person:04d}_{position:03d}_{camera + 1:02d}_0303morning_{position * 13:04d}_0{extended}.jpg"


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return people_units(spec, *_SPLITS)


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    _, split, index = unit
    records = []
    for shot in shots_of(spec, split, index):
        relative = f"{index:04d}/{image_name(index, shot.position, shot.camera)}"
        put(root, f"{split}/{relative}", shot.picture.jpeg())
        if split == "train":
            listed = "val" if shot.position == spec.images - 1 else "train"
        else:
            listed = "query" if is_query(spec, split, shot) else "gallery"
        records.append({**shot.record(f"{split}/{relative}"), "list": listed, "line": f"{relative} {index}\n"})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    for split in _SPLITS:
        (root / split).mkdir(exist_ok=True)
    for name in LISTS:
        put(root, f"list_{name}.txt", "".join(r["line"] for r in records if r["list"] == name).encode())
    return people_log(people_cards(spec, *_SPLITS), records)


EXPORTER = Exporter(_units, _write, _finish)
