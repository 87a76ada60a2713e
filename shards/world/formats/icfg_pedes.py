"""ICFG-PEDES: `imgs/` with MSMT17's folders and names, and `ICFG-PEDES.json` with one caption for each image.

A person lies in the folder `train` or `test` whatever the split; there is no val.
"""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, people_cards, people_log, people_units, put, put_json, shots_of
from shards.world.formats.msmt17 import image_name
from shards.world.spec import ExportSpec
from shards.world.vocabulary import words_of

_SPLITS = ("train", "test")


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return people_units(spec, *_SPLITS)


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    # MSMT17's folder and number, which have nothing to do with the split and the number here.
    folder, person = _SPLITS[number % 2], number // 2
    records = []
    for shot in shots_of(spec, split, index):
        caption = shot.captions(1)[0]
        path = f"{folder}/{person:04d}/{image_name(person, shot.position, shot.camera)}"
        put(root, f"imgs/{path}", shot.picture.jpeg())
        entry = {
            "split": split,
            "captions": [caption.text],
            "file_path": path,
            "processed_tokens": [words_of(caption.text)],
            "id": number - 1,
        }
        records.append({"entry": entry, **shot.record(path, caption)})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    put_json(root, "ICFG-PEDES.json", [record["entry"] for record in records])
    return people_log(people_cards(spec, *_SPLITS), records)


EXPORTER = Exporter(_units, _write, _finish)
