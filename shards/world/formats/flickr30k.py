"""Flickr30k: `flickr30k-images/` and Karpathy's `dataset_flickr30k.json`."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, put
from shards.world.formats.karpathy import put_karpathy
from shards.world.formats.pairs import generic_pair, split_pair_units
from shards.world.spec import ExportSpec


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split = unit
    pair = generic_pair(spec, number, 5)
    name = f"{1_000_000 + number}.jpg"
    put(root, f"flickr30k-images/{name}", pair.data)
    return [{"filename": name, "split": split, "captions": pair.captions}]


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    put_karpathy(root, "dataset_flickr30k.json", "flickr30k", records)
    return {"pairs": len(records)}


EXPORTER = Exporter(split_pair_units, _write, _finish)
