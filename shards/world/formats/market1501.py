"""Market-1501: `bounding_box_train`, `bounding_box_test`, `query` and the further distractors in `images`.

Everything else is in the file names. Identity 0000 is a distractor and -1 junk.
"""

from pathlib import Path
from typing import Any

from shards.world.formats.base import (
    Exporter,
    Record,
    card_of,
    is_query,
    people_cards,
    people_log,
    people_units,
    put,
    shots_of,
)
from shards.world.spec import ExportSpec

FOLDERS = ("bounding_box_train", "bounding_box_test", "query", "images")
_STRANGERS = {"distractor": 0, "junk": -1}


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    distractors = [(0, "distractor", index, "bounding_box_test") for index in range(spec.test_ids // 2)]
    junk = [(-1, "junk", index, "bounding_box_test") for index in range(spec.test_ids // 4)]
    more = [(0, "distractor", len(distractors) + index, "images") for index in range(len(distractors))]
    people = [(*person, "") for person in people_units(spec, "train", "test")]
    return people + distractors + junk + more


def _name(number: int, camera: int, position: int, index: int) -> str:
    """Return a file name such as 0002_c1s1_000451_03.jpg; frame numbers keep names of 0000 and -1 apart."""
    frame = (index * 37 + position * 11) % 1_000_000
    person = "-1" if number < 0 else f"{number:04d}"
    return f"{person}_c{camera + 1}s1_{frame:06d}_{position:02d}.jpg"


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index, folder = unit
    images = spec.images if number > 0 else 2
    records = []
    for shot in shots_of(spec, split, index, images):
        place = folder or ("bounding_box_train" if split == "train" else "bounding_box_test")
        if is_query(spec, split, shot):
            place = "query"
        path = f"{place}/{_name(number, shot.camera, shot.position, index)}"
        put(root, path, shot.picture.jpeg())
        records.append({**shot.record(path), "split": split, "index": index})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    strangers = {
        record["path"]: card_of(spec.world.identity(record["split"], record["index"]))
        for record in records
        if record["split"] in _STRANGERS
    }
    return {**people_log(people_cards(spec, "train", "test"), records), "strangers": strangers}


EXPORTER = Exporter(_units, _write, _finish, cameras=9)
