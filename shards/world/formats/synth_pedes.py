"""SYNTH-PEDES: `Part1/<id>/<n>.jpg` and so on, and `synthpedes_dataset.json`; training people only."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import (
    Exporter,
    Record,
    people_cards,
    people_log,
    people_units,
    put,
    put_json,
    shots_of,
)
from shards.world.identity import Identity
from shards.world.spec import ExportSpec

PARTS = 11
_ATTRIBUTES = ("presentation", "hair_colour", "upper_colour", "lower_colour", "shoe_colour", "bag")


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return people_units(spec, "train")


def _attributes(identity: Identity) -> str:
    """Return the six attributes that an annotation lists, as one text."""
    return ",".join(identity.attributes[name] for name in _ATTRIBUTES)


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    records = []
    for shot in shots_of(spec, split, index):
        captions = shot.captions()
        path = f"Part{number % PARTS + 1}/{number}/{shot.position + 1}.jpg"
        put(root, path, shot.picture.jpeg())
        attributes = _attributes(shot.identity)
        entry = {
            "id": number,
            "file_path": path,
            "attributes": [attributes],
            "captions": [caption.text for caption in captions],
            "prompt_caption": [f"A person with {attributes.replace(',', ', ')}."],
        }
        records.append({"entry": entry, **shot.record(path, *captions)})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    put_json(root, "synthpedes_dataset.json", [record["entry"] for record in records])
    return people_log(people_cards(spec, "train"), records)


EXPORTER = Exporter(_units, _write, _finish)
