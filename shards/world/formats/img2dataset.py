"""Generic image-text pairs as img2dataset leaves them: folders of .jpg, .txt and .json."""

import hashlib
import json
from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, put
from shards.world.formats.pairs import Pair, generic_pair, other_world, pair_units
from shards.world.spec import ExportSpec

SHARD_SIZE = 10_000
"""Rows per folder of an img2dataset output (its default)."""


def row_facts(pair: Pair, key: str) -> dict[str, Any]:
    """Return the `.json` that img2dataset writes beside an image."""
    width, height = pair.size
    return {
        "caption": pair.captions[0], "url": f"https://world.invalid/{key}.jpg", "key": key, "status": "success",
        "error_message": None, "width": width, "height": height, "original_width": width,
        "original_height": height, "exif": "{}", "sha256": hashlib.sha256(pair.data).hexdigest(),
    }  # fmt: skip


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number = unit[0]
    pair = generic_pair(spec, number)
    shard, row = divmod(number, SHARD_SIZE)
    key = f"{shard:05d}{row:04d}"
    put(root, f"{shard:05d}/{key}.jpg", pair.data)
    put(root, f"{shard:05d}/{key}.txt", pair.captions[0].encode())
    put(root, f"{shard:05d}/{key}.json", json.dumps(row_facts(pair, key), indent=4).encode())
    return [{"shard": shard, "person": pair.person, "bytes": len(pair.data)}]


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    counts: dict[int, int] = {}
    for record in records:
        counts[record["shard"]] = counts.get(record["shard"], 0) + 1
    for shard, count in counts.items():
        stats = {
            "count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0,
            "duration": 0.0, "start_time": 0.0, "end_time": 0.0, "status_dict": {"success": count},
        }  # fmt: skip
        put(root, f"{shard:05d}_stats.json", json.dumps(stats, indent=4).encode())
    people = sum(record["person"] for record in records)
    return {"pairs": len(records), "person_pairs": people, "other_world_seed": other_world(spec.world).seed}


EXPORTER = Exporter(pair_units, _write, _finish)
