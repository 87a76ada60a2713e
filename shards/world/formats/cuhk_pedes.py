"""CUHK-PEDES: `imgs/`, `reid_raw.json` and `caption_all.json`, the same entries without splits."""

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
from shards.world.spec import ExportSpec
from shards.world.vocabulary import words_of


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    folder = "train_query" if split == "train" else "test_query"
    records = []
    for shot in shots_of(spec, split, index):
        captions = shot.captions()
        path = f"{folder}/p{number}_s{shot.position + 1}.jpg"
        put(root, f"imgs/{path}", shot.picture.jpeg())
        entry = {
            "split": split,
            "captions": [caption.text for caption in captions],
            "file_path": path,
            "processed_tokens": [words_of(caption.text) for caption in captions],
            "id": number,
        }
        records.append({"entry": entry, **shot.record(path, *captions)})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    entries = [record["entry"] for record in records]
    put_json(root, "reid_raw.json", entries)
    unsplit = [{key: entry[key] for key in ("id", "file_path", "captions")} for entry in entries]
    put_json(root, "caption_all.json", unsplit)
    return people_log(people_cards(spec), records)


EXPORTER = Exporter(people_units, _write, _finish)
