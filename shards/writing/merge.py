"""The parts of a set to one index and one manifest."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.data.sample import (
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    ROLES,
    SPLITS,
    Manifest,
    ShardFile,
    Split,
    SplitCounts,
)
from reid_dist.errors import UserError
from shards.writing.files import write_file
from shards.writing.tar_shard import Rows, ShardPart


def write_index(
    folder: Path, dataset: str, parts: Iterable[ShardPart], card: dict[str, Any], records_sha256: str = ""
) -> Manifest:
    """Write index and, last of all, manifest: from then on the folder is a shard set.

    Args:
        folder: the set.
        dataset: its name.
        parts: of all tars, in order; taken one by one.
        card: what is known of the data set; goes into the manifest as it is.
        records_sha256: of records.jsonl, where one holds the records.

    Raises:
        UserError: there is no sample at all.
    """
    files: list[ShardFile] = []
    rows: list[Rows] = []
    identities: dict[str, int] = {}
    for number, part in enumerate(parts):
        index = part.index
        places = [identities.setdefault(pid, len(identities)) for pid in part.identities]
        index["pid"] = np.array(places, dtype=np.int32)[index["pid"]] if places else 0
        index["shard"] = number
        rows.append(index)
        files.append(part.file)
    if not sum(map(len, rows)):
        raise UserError(f"{folder}: no samples to write")
    index, names = _sort_identities(np.concatenate(rows), list(identities))
    assert index.dtype == INDEX_DTYPE
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_file(folder / INDEX_NAME, lambda file: file.write(buffer.getbuffer()))
    manifest = Manifest(
        dataset=dataset,
        shards=files,
        identities=names,
        splits=_count_splits(index),
        index_sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
        records_sha256=records_sha256,
        card=card,
    )
    text = manifest.model_dump_json(indent=1) + "\n"
    write_file(folder / MANIFEST_NAME, lambda file: file.write(text.encode()))
    return manifest


def _sort_identities(index: Rows, pids: Sequence[str]) -> tuple[Rows, list[str]]:
    """The index with identities numbered in sorted order, not in the shuffled one of the samples."""
    order = sorted(range(len(pids)), key=pids.__getitem__)
    place = np.empty(len(pids), dtype=np.int32)
    place[order] = np.arange(len(pids), dtype=np.int32)
    index["pid"] = place[index["pid"]]
    return index, [pids[number] for number in order]


def _count_splits(index: Rows) -> dict[Split, SplitCounts]:
    people = ~np.isin(index["role"], [ROLES.index("distractor"), ROLES.index("junk")])
    counts: dict[Split, SplitCounts] = {}
    for number, split in enumerate(SPLITS):
        rows = index["split"] == number
        if rows.any():
            cameras = np.unique(index["camid"][rows])
            counts[split] = SplitCounts(
                images=int(rows.sum()),
                identities=len(np.unique(index["pid"][rows & people])),
                captions=int(index["captions"][rows].sum()),
                cameras=int((cameras >= 0).sum()),
            )
    return counts
