"""MALS: `gene_crop/c_g_a_0/0.jpg` and so on with `gene_attrs/g_c_g_a_0_attrs.json`; one picture for each person."""

from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, put, put_json
from shards.world.formats.pairs import pair_units, person_pair
from shards.world.identity import Identity
from shards.world.spec import ExportSpec

FOLDER_SIZE = 1_000
_LABELS = 27


def _labels(identity: Identity) -> list[int]:
    """Return 1 for an attribute that is there and 0 for one that is not; what the world does not know is -1."""
    known = [int(value != "none") for _, value in sorted(identity.attributes.items())][:_LABELS]
    return known + [-1] * (_LABELS - len(known))


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    shot = person_pair(spec, unit[0])
    folder, number = divmod(unit[0], FOLDER_SIZE)
    path = f"gene_crop/c_g_a_{folder}/{number}.jpg"
    put(root, path, shot.picture.jpeg())
    entry = {
        "image": path,
        "caption": shot.captions()[0].text,
        "image_id": f"c_g_a_{folder}_{number}",
        "label": _labels(shot.identity),
    }
    return [{"entry": entry, "folder": folder}]


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    files: dict[int, list[Record]] = {}
    for record in records:
        files.setdefault(record["folder"], []).append(record["entry"])
    for folder, entries in files.items():
        put_json(root, f"gene_attrs/g_c_g_a_{folder}_attrs.json", entries)
    return {"pairs": len(records)}


EXPORTER = Exporter(pair_units, _write, _finish)
