"""Reading a labelled shard set by index: any sample is one pread away, in any order."""

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

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
)
from reid_dist.errors import UserError

Rows = npt.NDArray[np.int64]

_TAR_HEADER = 512
# Far below the usual limit of 1,024 descriptors per process, of which the job needs some for itself.
_MAX_OPEN_SHARDS = 256


class ShardSet:
    """A folder of shards with its manifest and index, checked on opening.

    File descriptors are opened when first needed and are left out of pickles, so a set can go to forked and to
    spawned workers. One process reads it from one thread.

    Attributes:
        path: the folder.
        name: the data set's name.
        manifest: the checked manifest.
        index: one INDEX_DTYPE row per sample.
        identities: pid strings; `index["pid"]` points into it.

    Args:
        path: folder written by `python -m shards.write`.

    Raises:
        UserError: the folder, manifest, index or a shard is missing, or they do not belong together.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptors: dict[int, int] = {}
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such shard folder; {self._remedy()}")
        self.manifest = self._read_manifest()
        self.name = self.manifest.dataset
        self.identities = self.manifest.identities
        self.index = self._read_index()
        self._check_shards()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def rows(self, split: str | None = None, roles: Iterable[str] | None = None) -> Rows:
        """Row numbers of a split and of some roles, ascending; None takes all.

        Args:
            split: one of SPLITS.
            roles: some of ROLES.

        Returns:
            int64 array of rows.
        """
        chosen = np.ones(len(self.index), dtype=bool)
        if split is not None:
            chosen &= self.index["split"] == SPLITS.index(split)
        if roles is not None:
            chosen &= np.isin(self.index["role"], [ROLES.index(role) for role in roles])
        return np.flatnonzero(chosen).astype(np.int64)

    def image_bytes(self, row: int) -> bytes:
        """The stored image file of a row; its sha256 is not compared."""
        entry = self.index[row]
        return self._read(int(entry["shard"]), int(entry["image_offset"]), int(entry["image_size"]))

    def sample(self, row: int) -> Sample:
        """The JSON record of a row.

        Raises:
            UserError: the record is damaged.
        """
        entry = self.index[row]
        data = self._read(int(entry["shard"]), int(entry["json_offset"]), int(entry["json_size"]))
        try:
            return Sample.model_validate_json(data)
        except ValidationError as error:
            reason = _first_problem(error)
            raise UserError(f"{self.describe(row)}: the JSON record is damaged ({reason}); {self._remedy()}") from None

    def key(self, row: int) -> str:
        """The sample's key, from the tar header in front of the image."""
        entry = self.index[row]
        header = self._read(int(entry["shard"]), int(entry["image_offset"]) - _TAR_HEADER, 100)
        key = header.split(b"\0", 1)[0].decode("ascii", "replace").rpartition(".")[0]
        return key if KEY_PATTERN.fullmatch(key) else "?"

    def describe(self, row: int) -> str:
        """Set, shard and key of a row, for messages."""
        shard = self.manifest.shards[int(self.index[row]["shard"])].name
        return f"{self.path} ({self.name}), shard {shard}, sample {self.key(row)}"

    def _remedy(self) -> str:
        return f"write it with `python -m shards.write NAME --root RAW --out {self.path}`"

    def _rewrite(self) -> str:
        return f"remove the folder and {self._remedy()}"

    def _read_manifest(self) -> Manifest:
        path = self.path / MANIFEST_NAME
        if not path.is_file():
            raise UserError(f"{path}: missing, so {self.path} is not a complete shard set; {self._rewrite()}")
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path}: not a valid manifest ({_first_problem(error)}); {self._rewrite()}") from None

    def _read_index(self) -> npt.NDArray[Any]:
        path = self.path / INDEX_NAME
        if not path.is_file():
            raise UserError(f"{path}: missing, so {self.path} is not a complete shard set; {self._rewrite()}")
        data = path.read_bytes()
        expected = self.manifest.index_sha256
        if expected and hashlib.sha256(data).hexdigest() != expected:
            raise UserError(f"{path}: its sha256 is not the one in {MANIFEST_NAME}; {self._rewrite()}")
        try:
            index: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a readable index ({error}); {self._rewrite()}") from None
        problem = _index_problem(index, self.manifest)
        if problem:
            raise UserError(f"{path}: does not fit {MANIFEST_NAME} ({problem}); {self._rewrite()}")
        return index

    def _check_shards(self) -> None:
        for shard in self.manifest.shards:
            path = self.path / shard.name
            if not path.is_file():
                raise UserError(f"{path}: missing shard, listed in {MANIFEST_NAME}; {self._rewrite()}")
            size = path.stat().st_size
            if size != shard.bytes:
                raise UserError(
                    f"{path}: {size} bytes, but {MANIFEST_NAME} says {shard.bytes} (an incomplete copy?); "
                    f"copy it again or {self._rewrite()}"
                )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            path = self.path / self.manifest.shards[shard].name
            raise UserError(f"{path}: ends inside a sample; copy it again or {self._rewrite()}")
        return data

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            path = self.path / self.manifest.shards[shard].name
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{path}: cannot be opened ({error.strerror}); {self._rewrite()}") from None
            self._descriptors[shard] = descriptor
        return descriptor


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _index_problem(index: npt.NDArray[Any], manifest: Manifest) -> str:
    """One phrase that says why the index cannot belong to this manifest; empty when it can."""
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        return "another dtype or shape"
    if len(index) != manifest.samples:
        return f"{len(index)} rows for {manifest.samples} samples"
    if not len(index):
        return ""
    if index["shard"].min() < 0 or index["shard"].max() >= len(manifest.shards):
        return "a row names a shard that is not listed"
    found = np.bincount(index["shard"], minlength=len(manifest.shards))
    if not np.array_equal(found, [shard.samples for shard in manifest.shards]):
        return "other numbers of samples per shard"
    if index["pid"].min() < 0 or index["pid"].max() >= len(manifest.identities):
        return "a row names an identity that is not listed"
    for field, names in (("split", SPLITS), ("role", ROLES)):
        if index[field].min() < 0 or index[field].max() >= len(names):
            return f"a row holds an unknown {field}"
    return _range_problem(index, manifest)


def _range_problem(index: npt.NDArray[Any], manifest: Manifest) -> str:
    ends = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)[index["shard"]]
    for kind, cap in (("image", MAX_IMAGE_BYTES), ("json", MAX_JSON_BYTES)):
        offset, size = index[f"{kind}_offset"], index[f"{kind}_size"].astype(np.int64)
        if size.min() < 0 or size.max() > cap:
            return f"a {kind} above the cap of {cap} bytes"
        if offset.min() < _TAR_HEADER or (offset > ends - size).any():
            return f"a {kind} outside its shard"
    return ""
