"""WebPerson: parquet files with the image as a struct of bytes and path, and two captions for each image."""

from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.world.formats.base import Exporter, Record
from shards.world.formats.pairs import person_pair
from shards.world.spec import ExportSpec

FILE_SIZE = 256
GROUP_SIZE = 64
"""Rows of a file and of a row group."""


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    starts = range(0, spec.ids, FILE_SIZE)
    return [(number, len(starts), start, min(start + FILE_SIZE, spec.ids)) for number, start in enumerate(starts)]


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("webperson: writing parquet needs pyarrow; pip install 'reid_dist[parquet]'") from None
    file, files, start, stop = unit
    rows = []
    for number in range(start, stop):
        shot = person_pair(spec, number)
        one, two = shot.captions(2)
        path = f"part-{file:05d}/{number:09d}.jpg"
        image = {"bytes": shot.picture.jpeg(), "path": None}
        rows.append({"image": image, "image_path": path, "caption1": one.text, "caption2": two.text})
    text = pyarrow.string()
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    schema = pyarrow.schema([("image", image_type), ("image_path", text), ("caption1", text), ("caption2", text)])
    (root / "data").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=schema),
        root / "data" / f"train-{file:05d}-of-{files:05d}.parquet",
        row_group_size=GROUP_SIZE,
    )
    return [{"file": file} for _ in rows]


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    return {"pairs": len(records)}


EXPORTER = Exporter(_units, _write, _finish)
