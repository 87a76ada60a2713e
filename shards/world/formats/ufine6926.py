"""UFine6926: numbered `images/`, one JSON, and two long captions for each image, each of several sentences."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, people_cards, people_log, people_units, put, put_json, shots_of
from shards.world.spec import ExportSpec

_SPLITS = ("train", "test")
SENTENCES = 3
"""Sentences of a caption: with about 23 words each they come near the 80.8 words of the data set."""


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return [(*person, place) for place, person in enumerate(people_units(spec, *_SPLITS))]


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index, place = unit
    records = []
    for shot in shots_of(spec, split, index):
        sentences = shot.captions(2 * SENTENCES)
        texts = [" ".join(one.text for one in sentences[start::2]) for start in range(2)]
        path = f"images/{place * spec.images + shot.position + 1}.jpg"
        put(root, path, shot.picture.jpeg())
        entry = {"split": split, "id": number, "file_path": path, "captions": texts}
        mentions = [[pair for one in sentences[start::2] for pair in one.mentions] for start in range(2)]
        records.append({"entry": entry, **shot.record(path), "mentions": mentions})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    put_json(root, "UFine6926.json", [record["entry"] for record in records])
    return people_log(people_cards(spec, *_SPLITS), records)


EXPORTER = Exporter(_units, _write, _finish)
