"""LUPerson-MLLM: a folder of images and four caption files `{path: caption}`, some of them with template leaks."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, put, put_json
from shards.world.formats.pairs import pair_units, person_pair
from shards.world.spec import ExportSpec

FILES = ("Ts-qwen", "Td-qwen", "Ts-shikra", "Td-shikra")
LEAK_EVERY = 10
"""One in so many images has a caption of the last file in which the template shows through."""


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number = unit[0]
    shot = person_pair(spec, number)
    name = f"{number:07d}.jpg"
    put(root, f"LUPerson-MLLM/{name}", shot.picture.jpeg())
    captions = [caption.text for caption in shot.captions(len(FILES))]
    if number % LEAK_EVERY == LEAK_EVERY - 1:
        captions[-1] = "The [clothing description] of the person is <colour>."
    return [{"path": f"LUPerson_images/part{number % 4 + 1}/{name}", "captions": captions}]


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    for position, name in enumerate(FILES):
        put_json(root, f"{name}.json", {record["path"]: record["captions"][position] for record in records})
    return {"pairs": len(records)}


EXPORTER = Exporter(pair_units, _write, _finish)
