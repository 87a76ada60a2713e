"""RSTPReid: `imgs/` without folders and `data_captions.json`, whose key of the file is `img_path`."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, people_cards, people_log, people_units, put, put_json, shots_of
from shards.world.spec import ExportSpec


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    records = []
    for shot in shots_of(spec, split, index):
        captions = shot.captions()
        path = f"{number - 1:04d}_c{shot.camera + 1}_{shot.position:04d}.jpg"
        put(root, f"imgs/{path}", shot.picture.jpeg())
        texts = [caption.text for caption in captions]
        entry = {"id": number - 1, "img_path": path, "captions": texts, "split": split}
        records.append({"entry": entry, **shot.record(path, *captions)})
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    put_json(root, "data_captions.json", [record["entry"] for record in records])
    return people_log(people_cards(spec), records)


EXPORTER = Exporter(people_units, _write, _finish)
