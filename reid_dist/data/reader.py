"""Reading a shard set by index: any sample is one byte range away, in any order, on this machine or behind a URL."""

import hashlib
import io
import operator
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from reid_dist.data import remote
from reid_dist.data.byte_ranges import ByteRanges
from reid_dist.data.sample import (
    INDEX_DTYPE,
    INDEX_NAME,
    KEY_PATTERN,
    MANIFEST_NAME,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    RECORDS_NAME,
    ROLES,
    SPLITS,
    Manifest,
    Sample,
    ShardFile,
    content_digest,
)
from reid_dist.errors import UserError

Rows = npt.NDArray[np.int64]

_TAR_HEADER = 512
_MAX_MANIFEST_BYTES = 1 << 30
# numpy's header in front of the rows of an index.
_MAX_INDEX_HEADER = 1 << 16
# Where a content is, out of a row as a tuple. This runs for every image, and picking fields by name is slower.
_NAMES = INDEX_DTYPE.names or ()
_PLACE = {
    kind: operator.itemgetter(*map(_NAMES.index, ("shard", f"{kind}_offset", f"{kind}_size", f"{kind}_digest")))
    for kind in ("image", "json")
}


class ShardSet:
    """A folder of shards with its manifest and index, checked on opening.

    Every image and record that is read is compared with the digest that the index keeps of it. Descriptors and
    connections are made when first needed and are left out of pickles, so a set can go to forked and to spawned
    workers. One process reads it from one thread.

    Attributes:
        location: the absolute path or the URL of the folder.
        path: the folder as given; of a URL only a name for it.
        shown: where it lies, as messages say it: the folder as given, or the URL without what is secret in it.
        name: the data set's name.
        manifest: the checked manifest.
        index: one INDEX_DTYPE row per sample.
        identities: pid strings; `index["pid"]` points into it.

    Args:
        location: folder written by `python -m shards.write` or `shards.index`: a path, or an https, http or s3 URL.

    Raises:
        UserError: the folder, manifest, index or a shard is missing, or they do not belong together.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        checked = remote.check_location(location)
        self._remote = remote.is_remote(checked)
        self.path = Path(checked)
        self.location = checked if self._remote else os.path.abspath(checked)
        self.shown = remote.shown_location(checked) if self._remote else str(self.path)
        self._ranges = ByteRanges()
        self._records: IO[bytes] | None = None
        if not self._remote and not self.path.is_dir():
            raise UserError(f"{self.shown}: no such shard folder; {self._remedy()}")
        self.manifest = self._read_manifest()
        self.name = self.manifest.dataset
        self.identities = self.manifest.identities
        self.index = self._read_index()
        self._shards = [self._shard_location(shard) for shard in self.manifest.shards]
        if self.manifest.records_sha256:
            self._records = self._open_records()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

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
        """The stored image file of a row.

        Raises:
            UserError: it cannot be read, or its bytes are not those that were indexed.
        """
        return self._content(row, "image")

    def sample(self, row: int) -> Sample:
        """The JSON record of a row.

        Raises:
            UserError: it cannot be read, or is damaged.
        """
        data = self._content(row, "json")
        try:
            return Sample.model_validate_json(data)
        except ValidationError as error:
            reason = _first_problem(error)
            raise UserError(f"{self.describe(row)}: the JSON record is damaged ({reason}); {self._rewrite()}") from None

    def key(self, row: int) -> str:
        """The sample's key, from the tar header in front of the image; "?" where that is damaged.

        Raises:
            UserError: the shard cannot be read.
        """
        entry = self.index[row]
        header = self._read(int(entry["shard"]), int(entry["image_offset"]) - _TAR_HEADER, 100)
        name = header.split(b"\0", 1)[0].decode("ascii", "replace").rpartition("/")[2]
        key = name.partition(".")[0]
        return key if KEY_PATTERN.fullmatch(key) else "?"

    def describe(self, row: int) -> str:
        """Set, shard and key of a row, for messages; of a shard that cannot be read the row number."""
        shard = self.manifest.shards[int(self.index[row]["shard"])].name
        try:
            key = self.key(row)
        except UserError:
            key = "?"
        return f"{self.shown} ({self.name}), shard {shard}, sample {key if key != '?' else f'? (row {row})'}"

    def _remedy(self) -> str:
        return f"write it with `python -m shards.write NAME --root RAW --out {self.shown}`"

    def _rewrite(self) -> str:
        foreign = hasattr(self, "manifest") and any(shard.location for shard in self.manifest.shards)
        if foreign or self._remote:
            where = "index it again with `python -m shards.index build`" if foreign else "write and upload it again"
            return f"restore it from a copy or {where}"
        return f"remove the folder and {self._remedy()}"

    def _side_file(self, name: str, max_bytes: int) -> bytes:
        """A file beside the shards, whole."""
        location = remote.join_location(self.location, name)
        if self._remote:
            return remote.read_file(location, max_bytes)
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path}: missing, so {self.path} is not a complete shard set; {self._rewrite()}")
        try:
            if path.stat().st_size > max_bytes:
                raise UserError(f"{path}: more than {max_bytes} bytes, the cap for such a file; {self._rewrite()}")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore it from a copy") from None

    def _read_manifest(self) -> Manifest:
        data = self._side_file(MANIFEST_NAME, _MAX_MANIFEST_BYTES)
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise UserError(
                f"{self._file(MANIFEST_NAME)}: not a valid manifest ({_first_problem(error)}); {self._rewrite()}"
            ) from None

    def _read_index(self) -> npt.NDArray[Any]:
        file = self._file(INDEX_NAME)
        data = self._side_file(INDEX_NAME, self.manifest.samples * INDEX_DTYPE.itemsize + _MAX_INDEX_HEADER)
        expected = self.manifest.index_sha256
        if expected and hashlib.sha256(data).hexdigest() != expected:
            raise UserError(f"{file}: its sha256 is not the one in {MANIFEST_NAME}; {self._rewrite()}")
        try:
            index: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{file}: not a readable index ({error}); {self._rewrite()}") from None
        problem = _index_problem(index, self.manifest)
        if problem:
            raise UserError(f"{file}: does not fit {MANIFEST_NAME} ({problem}); {self._rewrite()}")
        return index

    def _shard_location(self, shard: ShardFile) -> str:
        """Where a shard is; local ones are looked at, as all of them cost less than one late surprise."""
        if shard.location:
            location = remote.check_location(shard.location)
            if not remote.is_remote(location) and (self._remote or not os.path.isabs(location)):
                raise UserError(
                    f"{self._file(MANIFEST_NAME)}: shard {shard.name} lies at {location[:200]}, which is no URL"
                    f"{'' if self._remote else ' and no absolute path'}; {self._rewrite()}"
                )
        else:
            location = remote.join_location(self.location, shard.name)
        if remote.is_remote(location):
            return location
        path = Path(location) if shard.location else self.path / shard.name
        if not path.is_file():
            raise UserError(f"{path}: missing shard, listed in {MANIFEST_NAME}; {self._rewrite()}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"{path}: {size} bytes, but {MANIFEST_NAME} says {shard.bytes} (an incomplete copy?); "
                f"copy it again or {self._rewrite()}"
            )
        return location

    def _open_records(self) -> IO[bytes]:
        """The file of records; of a remote set a copy that goes with this process."""
        name = self._file(RECORDS_NAME)
        end = int((self.index["json_offset"] + self.index["json_size"]).max(initial=0))
        if not self._remote:
            try:
                file: IO[bytes] = (self.path / RECORDS_NAME).open("rb")
            except OSError as error:
                raise UserError(f"{name}: cannot be opened ({error.strerror}); {self._rewrite()}") from None
            if os.fstat(file.fileno()).st_size < end:
                file.close()
                raise UserError(f"{name}: ends before the last record of {INDEX_NAME}; {self._rewrite()}")
            return file
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            # One byte more: the end of the last line.
            digest = remote.copy_file(remote.join_location(self.location, RECORDS_NAME), file, end + 1)
            if digest != self.manifest.records_sha256:
                raise UserError(f"{name}: its sha256 is not the one in {MANIFEST_NAME}; {self._rewrite()}")
        except BaseException:
            file.close()
            raise
        return file

    def _file(self, name: str) -> str:
        """A file beside the shards, as messages call it."""
        return remote.join_location(self.shown, name)

    def _content(self, row: int, kind: str) -> bytes:
        """The image or the record of a row, compared with its digest."""
        shard, offset, size, digest = _PLACE[kind](self.index[row].item())
        # What was damaged on its way is whole the second time.
        for _ in range(2 if remote.is_remote(self._shards[shard]) else 1):
            try:
                if kind == "json" and self.manifest.records_sha256:
                    data = self._read_record(offset, size)
                else:
                    data = self._read(shard, offset, size)
            except UserError as error:
                raise UserError(f"{self.describe(row)}: {error}") from None
            if content_digest(data) == digest:
                return data
        what = "image" if kind == "image" else "JSON record"
        raise UserError(
            f"{self.describe(row)}: the {what} is damaged (its sha256 is not the one in {INDEX_NAME}); "
            f"{self._rewrite()}"
        )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        return self._ranges.read(self._shards[shard], offset, size)

    def _read_record(self, offset: int, size: int) -> bytes:
        if self._records is None:  # in a spawned worker
            self._records = self._open_records()
        data = os.pread(self._records.fileno(), size, offset)
        if len(data) != size:
            raise UserError(f"{self._file(RECORDS_NAME)}: ends inside a record; {self._rewrite()}")
        return data


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
    if index["captions"].min() < 0 or (index["captions"] > index["json_size"]).any():
        return "a row with more captions than its record can hold"
    return _range_problem(index, manifest)


def _range_problem(index: npt.NDArray[Any], manifest: Manifest) -> str:
    ends = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)[index["shard"]]
    for kind, cap in (("image", MAX_IMAGE_BYTES), ("json", MAX_JSON_BYTES)):
        offset, size = index[f"{kind}_offset"], index[f"{kind}_size"].astype(np.int64)
        in_tar = kind == "image" or not manifest.records_sha256
        if size.min() < 0 or size.max() > cap:
            return f"a {kind} above the cap of {cap} bytes"
        if offset.min() < (_TAR_HEADER if in_tar else 0) or (in_tar and (offset > ends - size).any()):
            return f"a {kind} outside its shard"
        if offset.max() >= 2**62:
            return f"a {kind} outside its file"
    return ""
