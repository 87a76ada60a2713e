"""LUPerson: tracklet folders below `images/`, and the same files in an LMDB in `lmdb/` with their paths as keys.

The pictures are those of training people; a tracklet is what one camera saw of a person.
"""

from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.world.formats.base import Exporter, Record, people_cards, people_log, people_units, put, shots_of
from shards.world.spec import ExportSpec

_MAP_BYTES = 1 << 40
"""Upper bound of the LMDB; its file grows as it is filled."""


def _units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return people_units(spec, "train")


def _write(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    records = []
    for shot in shots_of(spec, split, index):
        path = f"video{shot.camera}/{number:06d}/{shot.k:03d}.jpg"
        put(root, f"images/{path}", shot.picture.jpeg())
        records.append(shot.record(path))
    return records


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    try:
        import lmdb
    except ImportError:
        raise UserError("the format luperson needs the package lmdb: pip install 'reid_dist[lmdb]'") from None
    (root / "lmdb").mkdir()
    # Without its lock file, which holds the number of this process, equal exports are equal files.
    environment = lmdb.open(str(root / "lmdb"), map_size=_MAP_BYTES, lock=False)
    with environment.begin(write=True) as transaction:
        for path in sorted(record["path"] for record in records):
            transaction.put(path.encode(), (root / "images" / path).read_bytes())
    environment.close()
    return people_log(people_cards(spec, "train"), records)


EXPORTER = Exporter(_units, _write, _finish)
