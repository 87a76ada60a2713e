"""Writing a shard set: deterministic tars, the index that finds their samples and the manifest over both.

The same samples in the same order give the same bytes: USTAR headers without time, owner or mode of the raw file.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from reid_dist.data.sample import (
    INDEX_DTYPE,
    INDEX_NAME,
    KEY_PATTERN,
    MANIFEST_NAME,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    ROLES,
    SPLITS,
    Manifest,
    Sample,
    ShardFile,
    Split,
    SplitCounts,
)
from reid_dist.errors import UserError

_HEADER = tarfile.BLOCKSIZE
_MAX_TAR_NAME = 100


class ShardWriter:
    """Writes samples into tars of about `shard_bytes`, then index and manifest.

    The folder is complete once `finish` returns; a reader refuses one without a manifest, which is written last.

    Args:
        folder: an existing folder.
        dataset: name of the data set, also the tars' prefix.
        shard_bytes: a new tar is begun before one would grow above this.
    """

    def __init__(self, folder: Path, dataset: str, shard_bytes: int = 64_000_000) -> None:
        self.folder = folder
        self.dataset = dataset
        self.shard_bytes = shard_bytes
        self._shards: list[ShardFile] = []
        self._rows: list[tuple[int, ...]] = []
        self._identities: dict[str, int] = {}
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self._file: IO[bytes] | None = None
        self._first_row = 0

    def add(self, key: str, sample: Sample, image: bytes) -> None:
        """Append one sample.

        Args:
            key: unique, `[A-Za-z0-9_-]`, at most 95 characters.
            sample: its record; `sample.sha256` is that of `image`.
            image: the JPEG file.

        Raises:
            UserError: the key is malformed or taken, or image or record is above its cap.
        """
        record = sample.model_dump_json().encode()
        self._check(key, sample, image, record)
        if self._tar is not None and self._tar.offset + len(image) + len(record) > self.shard_bytes:
            self._close_shard()
        if self._tar is None:
            self._open_shard()
        image_offset = self._append(f"{key}.jpg", image)
        json_offset = self._append(f"{key}.json", record)
        self._rows.append(
            (
                len(self._shards),
                image_offset,
                len(image),
                json_offset,
                len(record),
                self._identities.setdefault(sample.pid, len(self._identities)),
                sample.camid,
                SPLITS.index(sample.split),
                ROLES.index(sample.role),
                len(sample.captions),
            )
        )

    def finish(self, card: dict[str, Any]) -> Manifest:
        """Close the last tar, write index and manifest.

        Args:
            card: what is known of the data set; goes into the manifest as it is.

        Raises:
            UserError: no sample was added.
        """
        if not self._rows:
            raise UserError(f"{self.folder}: no samples to write")
        self._close_shard()
        index, identities = self._sorted_index()
        buffer = io.BytesIO()
        np.save(buffer, index, allow_pickle=False)
        write_file(self.folder / INDEX_NAME, lambda file: file.write(buffer.getbuffer()))
        manifest = Manifest(
            dataset=self.dataset,
            shards=self._shards,
            identities=identities,
            splits=_count_splits(index),
            index_sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
            card=card,
        )
        text = manifest.model_dump_json(indent=1) + "\n"
        write_file(self.folder / MANIFEST_NAME, lambda file: file.write(text.encode()))
        return manifest

    def abort(self) -> None:
        """Let go of an open tar; what was written stays incomplete."""
        if self._file is not None:
            self._file.close()
        self._file = self._tar = None

    def _check(self, key: str, sample: Sample, image: bytes, record: bytes) -> None:
        if not KEY_PATTERN.fullmatch(key) or len(key) + len(".json") > _MAX_TAR_NAME:
            raise UserError(f"{sample.source}: {key[:200]!r} is not a sample key ([A-Za-z0-9_-], at most 95)")
        if key in self._keys:
            raise UserError(f"{sample.source}: sample key {key} is already taken")
        if len(image) > MAX_IMAGE_BYTES:
            raise UserError(f"{sample.source}: {len(image)} bytes, more than the cap of {MAX_IMAGE_BYTES}")
        if len(record) > MAX_JSON_BYTES:
            raise UserError(
                f"{sample.source}: a record of {len(record)} bytes, more than the cap of {MAX_JSON_BYTES}; "
                f"shorten its captions"
            )
        self._keys.add(key)

    def _open_shard(self) -> None:
        name = f"{self.dataset}-{len(self._shards):06d}.tar"
        self._file = (self.folder / name).open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _append(self, name: str, content: bytes) -> int:
        assert self._tar is not None
        info = tarfile.TarInfo(name)  # its defaults: mode 0644, time 0, owner 0 without name
        info.size = len(content)
        offset = self._tar.offset + _HEADER
        self._tar.addfile(info, io.BytesIO(content))
        return offset

    def _close_shard(self) -> None:
        assert self._tar is not None and self._file is not None
        path = Path(self._file.name)
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._tar = self._file = None
        self._shards.append(
            ShardFile(
                name=path.name,
                sha256=file_sha256(path),
                bytes=path.stat().st_size,
                samples=len(self._rows) - self._first_row,
            )
        )
        self._first_row = len(self._rows)

    def _sorted_index(self) -> tuple[np.ndarray[Any, Any], list[str]]:
        """The index with identities numbered in sorted order, not in the shuffled one of the samples."""
        index = np.array(self._rows, dtype=INDEX_DTYPE)
        identities = sorted(self._identities)
        place = np.empty(len(identities), dtype=np.int32)
        place[[self._identities[pid] for pid in identities]] = np.arange(len(identities))
        index["pid"] = place[index["pid"]]
        return index, identities


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _count_splits(index: np.ndarray[Any, Any]) -> dict[Split, SplitCounts]:
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
