"""CUHK03-NP: PNG files in `detected/` and `labeled/`, two cameras, numbers that begin anew with each camera pair.

A labelled box is the picture, a detected one cuts into it. The detector misses the last picture of every fifth
training person, so that the two variants differ in number as the real ones do.
"""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from shards.world.formats.base import Exporter, Record, is_query, people_cards, people_log, people_units, put, shots_of
from shards.world.spec import ExportSpec

_SPLITS = ("train", "test")
PAIRS, CAMERAS = 3, 2


def detected(image: Image.Image) -> Image.Image:
    """Return what a careless detector makes of a picture: a tenth of its height is cut off below."""
    return image.crop((0, 0, image.width, image.height - image.height // 10))


def missed(number: int, split: str, position: int, images: int) -> bool:
    """Return whether the detector misses a picture."""
    return split == "train" and number % 5 == 1 and position == images - 1


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return people_units(spec, *_SPLITS)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    person = f"{number % PAIRS + 1}_{number // PAIRS:03d}"
    records = []
    for shot in shots_of(spec, split, index):
        folder = "bounding_box_train" if split == "train" else "bounding_box_test"
        if is_query(spec, split, shot):
            folder = "query"
        # The two cameras of a pair: the world's even and odd ones.
        path = f"{folder}/{person}_{shot.camera % CAMERAS + 1}_{shot.position + 1:02d}.png"
        put(root, f"labeled/{path}", _png(shot.picture.image))
        records.append(shot.record(f"labeled/{path}"))
        if not missed(number, split, shot.position, spec.images):
            put(root, f"detected/{path}", _png(detected(shot.picture.image)))
            records.append(shot.record(f"detected/{path}"))
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    return people_log(people_cards(spec, *_SPLITS), records)


EXPORTER = Exporter(_units, _write, _finish)
