"""A tiny shard set of plain coloured images, written here so that evaluation needs no converter."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from reid_dist.data.sample import INDEX_DTYPE, ROLES, SPLITS, Sample, content_digest

Entry = tuple[str, int, str, list[str]]  # pid, camera, role, captions
COLOURS = (
    "red",
    "green",
    "blue",
    "white",
    "black",
    "yellow",
    "purple",
    "orange",
    "gray",
    "brown",
    "pink",
    "cyan",
)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - (len(data) + 511) // 512 * 512


def write_set(folder: Path, entries: list[Entry], name: str = "toy", split: str = "test") -> Path:
    """Writes the entries as one shard; an image's colour follows its identity, its brightness the camera."""
    folder.mkdir(parents=True)
    identities = sorted({f"{name}:{pid}" for pid, _, _, _ in entries})
    index = np.zeros(len(entries), INDEX_DTYPE)
    with tarfile.open(folder / "toy-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (pid, camid, role, captions) in enumerate(entries):
            base = Image.new(
                "RGB",
                (16, 32),
                COLOURS[identities.index(f"{name}:{pid}") % len(COLOURS)],
            )
            picture = base.point([min(255, value // 2 + 20 * camid + 10) for value in range(256)] * 3)
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            image = buffer.getvalue()
            sample = Sample(
                dataset=name, pid=f"{name}:{pid}", camid=camid, split=split, role=role, captions=captions,
                source=f"{i}.png", width=16, height=32, sha256=hashlib.sha256(image).hexdigest(),
            )  # fmt: skip
            record = sample.model_dump_json().encode()
            image_offset, json_offset = (
                _add(tar, f"{i:06d}.jpg", image),
                _add(tar, f"{i:06d}.json", record),
            )
            pid_index = identities.index(f"{name}:{pid}")
            digests = (content_digest(image), content_digest(record))
            files = (image_offset, len(image), json_offset, len(record), *digests)
            index[i] = (0, *files, pid_index, camid, SPLITS.index(split), ROLES.index(role), len(captions))
    data = (folder / "toy-000000.tar").read_bytes()
    np.save(folder / "index.npy", index)
    shard = {
        "name": "toy-000000.tar",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    manifest = {
        "format_version": 1, "dataset": name, "shards": [shard | {"samples": len(entries)}],
        "identities": identities, "splits": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
