"""Shard sets and tars for the tests of streams, written here and not by the package."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from reid_dist.data.sample import INDEX_DTYPE, ROLES, SPLITS, content_digest
from tests.hostile_tars import END, join, jpeg, member, pairs, record


def write_set(
    folder: Path, counts: list[int], captions: int = 1, other: int = 0, spoil: tuple[int, ...] = (), size: int = 20
) -> Path:
    """A shard set with so many training samples in each tar, each behind `other` samples of the test split.

    Samples are numbered through; image and caption of `n` are `jpeg(n)` and "picture n caption c". The images of
    `spoil` are no images.
    """
    folder.mkdir(parents=True)
    name, number, rows, shards, pids = folder.name, 0, [], [], []
    for shard, count in enumerate(counts):
        tar = b""
        for place in range(other + count):
            image = b"\xff\xd8\xff\xe0 not an image" if number in spoil else jpeg(number, size, size // 2)
            split, role = ("test", "gallery") if place < other else ("train", "train")
            texts = [f"picture {number} caption {c}" for c in range(captions)]
            pid = f"{name}:{number:06d}"
            text = record(number, image, name, pid=pid, split=split, role=role, captions=texts)
            head = member(f"s{number:06d}.jpg", image)
            offsets = len(tar) + 512, len(tar) + len(head) + 512
            tar += head + member(f"s{number:06d}.json", text)
            digests = content_digest(image), content_digest(text)
            places = SPLITS.index(split), ROLES.index(role)
            rows.append((shard, offsets[0], len(image), offsets[1], len(text), *digests, number, 0, *places, captions))
            pids.append(pid)
            number += 1
        (folder / f"{name}-{shard:06d}.tar").write_bytes(tar + END)
        facts = {"name": f"{name}-{shard:06d}.tar", "samples": other + count}
        shards.append({**facts, "bytes": len(tar + END), "sha256": hashlib.sha256(tar + END).hexdigest()})
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=INDEX_DTYPE))
    (folder / "index.npy").write_bytes(buffer.getvalue())
    manifest = {"dataset": name, "shards": shards, "identities": pids, "splits": {}}
    manifest["index_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_tars(folder: Path, counts: list[int]) -> Path:
    """Tars as img2dataset names and fills them; sample `n` is that of `hostile_tars.pairs`."""
    folder.mkdir(parents=True)
    start = 0
    for number, count in enumerate(counts):
        (folder / f"{number:05d}.tar").write_bytes(join(pairs(count, "img2dataset", start)))
        start += count
    return folder
