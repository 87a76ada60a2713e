"""COCO captions in both forms over the same pictures: the official JSON of 2017 and Karpathy's `dataset_coco.json`.

The official form has no captions of test images; those stand only in Karpathy's, with their name of 2014.
"""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, put, put_json
from shards.world.formats.karpathy import put_karpathy
from shards.world.formats.pairs import generic_pair, split_pair_units
from shards.world.spec import ExportSpec

RESTVAL_EVERY = 4
"""One in so many training pictures is a `restval` of Karpathy's."""
SIX_EVERY = 10
"""One in so many pictures has six sentences instead of five, if it has more than one."""
_FOLDERS = {"train": "train2017", "val": "val2017", "test": "val2014"}


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split = unit
    pair = generic_pair(spec, number, 6 if number % SIX_EVERY == 0 else 5)
    cocoid = number + 1
    restval = split == "train" and number % RESTVAL_EVERY == RESTVAL_EVERY - 1
    filepath = "train2014" if split == "train" and not restval else "val2014"
    filename = f"COCO_{filepath}_{cocoid:012d}.jpg"
    put(root, f"{_FOLDERS[split]}/{filename if split == 'test' else f'{cocoid:012d}.jpg'}", pair.data)
    entry = {
        "filepath": filepath, "filename": filename, "split": "restval" if restval else split, "cocoid": cocoid,
        "captions": pair.captions,
    }  # fmt: skip
    return [{"entry": entry, "split": split, "size": pair.size}]


def _official(records: list[Record]) -> dict[str, Any]:
    images: list[Record] = []
    annotations: list[Record] = []
    for record in records:
        cocoid, (width, height) = record["entry"]["cocoid"], record["size"]
        images.append({"license": 1, "file_name": f"{cocoid:012d}.jpg", "height": height, "width": width, "id": cocoid})
        for caption in record["entry"]["captions"]:
            annotations.append({"image_id": cocoid, "id": len(annotations) + 1, "caption": caption})
    return {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations}


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    for split in ("train", "val"):
        content = _official([record for record in records if record["split"] == split])
        put_json(root, f"annotations/captions_{split}2017.json", content)
    put_karpathy(root, "dataset_coco.json", "coco", [record["entry"] for record in records])
    return {"pairs": len(records)}


EXPORTER = Exporter(split_pair_units, _write, _finish)
