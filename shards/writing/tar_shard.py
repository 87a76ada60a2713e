"""One tar of a shard set: written with the same bytes wherever and whenever the same samples are given.

USTAR headers without time, owner or mode of the raw files. Beside the tar stands a part (`partial/NAME.json`) with
its hash and index rows until all tars are there and `shards.writing.merge` makes one index of them.
"""

import base64
import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from reid_dist.data.sample import (
    INDEX_DTYPE,
    KEY_PATTERN,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    ROLES,
    SPLITS,
    Sample,
    ShardFile,
    content_digest,
)
from reid_dist.errors import UserError
from shards.writing.files import Temporary, write_file

PARTIAL_NAME = "partial"

_HEADER = tarfile.BLOCKSIZE
_MAX_TAR_NAME = 100

Rows = npt.NDArray[Any]


class ShardPart(BaseModel):
    """What the index needs of one finished tar.

    Attributes:
        file: name, hash and counts.
        identities: pids in the order of their first sample.
        rows: base64 of the INDEX_DTYPE rows; `shard` is 0 and `pid` is a position in `identities`.
        encoded: images that were encoded anew; the others were copied.
        excluded: samples that were left out on request.
        skipped: samples that could not be used, each with the reason.
        failed: rows of a foreign tar that say themselves that their download failed.
        ignored: how often each unknown kind of member occurs in a foreign tar.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: ShardFile
    identities: list[str]
    rows: str
    encoded: int = 0
    excluded: int = 0
    skipped: list[str] = []
    failed: int = 0
    ignored: dict[str, int] = {}

    @property
    def index(self) -> Rows:
        """The rows as an array of its own."""
        rows: Rows = np.frombuffer(base64.b64decode(self.rows), dtype=INDEX_DTYPE).copy()
        return rows

    def with_index(self, index: Rows) -> "ShardPart":
        """The same with other rows."""
        return self.model_copy(update={"rows": _encoded(index)})


class IndexRows:
    """Index rows of one tar while they are collected."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._identities: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample: Sample, image: tuple[int, bytes], record: tuple[int, bytes]) -> None:
        """Append a row.

        Args:
            sample: the record.
            image: offset and content of the image.
            record: offset and content of the record's JSON.
        """
        self._rows.append(
            (
                0,
                image[0],
                len(image[1]),
                record[0],
                len(record[1]),
                content_digest(image[1]),
                content_digest(record[1]),
                self._identities.setdefault(sample.pid, len(self._identities)),
                sample.camid,
                SPLITS.index(sample.split),
                ROLES.index(sample.role),
                len(sample.captions),
            )
        )

    def part(self, file: ShardFile, **facts: Any) -> ShardPart:
        """The part of a finished tar.

        Args:
            file: the tar.
            **facts: the other fields of ShardPart.
        """
        rows = _encoded(np.array(self._rows, dtype=INDEX_DTYPE))
        return ShardPart(file=file, identities=list(self._identities), rows=rows, **facts)


class TarShard:
    """A tar that is being written; it takes its name in `finish`.

    Args:
        path: the tar.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._temporary = Temporary(path)
        self._hashing = _HashingFile(self._temporary.file)
        # tarfile only writes and asks for the position.
        self._tar = tarfile.open(fileobj=cast(IO[bytes], self._hashing), mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows = IndexRows()

    @property
    def size(self) -> int:
        """Bytes so far, without the end mark."""
        return int(self._tar.offset)

    def add(self, key: str, sample: Sample, image: bytes) -> None:
        """Append one sample.

        Args:
            key: `[A-Za-z0-9_-]`, at most 95 characters, not yet in this set.
            sample: its record; `sample.sha256` is that of `image`.
            image: the JPEG file.

        Raises:
            UserError: the key is malformed, or image or record is above its cap.
        """
        record = sample.model_dump_json().encode()
        if not KEY_PATTERN.fullmatch(key) or len(key) + len(".json") > _MAX_TAR_NAME:
            raise UserError(f"{sample.source}: {key[:200]!r} is not a sample key ([A-Za-z0-9_-], at most 95)")
        if len(image) > MAX_IMAGE_BYTES:
            raise UserError(f"{sample.source}: {len(image)} bytes, more than the cap of {MAX_IMAGE_BYTES}")
        if len(record) > MAX_JSON_BYTES:
            raise UserError(
                f"{sample.source}: a record of {len(record)} bytes, more than the cap of {MAX_JSON_BYTES}; "
                f"shorten its captions"
            )
        image_offset = self._append(f"{key}.jpg", image)
        json_offset = self._append(f"{key}.json", record)
        self._rows.add(sample, (image_offset, image), (json_offset, record))

    def finish(self, **facts: Any) -> ShardPart:
        """Close the tar and give it its name.

        Args:
            **facts: what else is known for the part.
        """
        self._tar.close()
        file = ShardFile(
            name=self._temporary.path.name,
            sha256=self._hashing.digest.hexdigest(),
            bytes=self._hashing.tell(),
            samples=len(self._rows),
        )
        self._temporary.commit()
        return self._rows.part(file, **facts)

    def discard(self) -> None:
        """Remove what was written; nothing after `finish`."""
        self._temporary.discard()

    def _append(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        offset = self._tar.offset + _HEADER
        self._tar.addfile(info, io.BytesIO(content))
        return offset


def _encoded(index: Rows) -> str:
    return base64.b64encode(index.tobytes()).decode()


class _HashingFile:
    """Hashes what is written, so that a finished tar need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._position


def part_path(folder: Path, tar: str) -> Path:
    """Where the part of a tar stands until the merge."""
    return folder / PARTIAL_NAME / f"{tar}.json"


def write_part(folder: Path, part: ShardPart) -> None:
    """Write the part of a tar that is there."""
    text = part.model_dump_json() + "\n"
    write_file(part_path(folder, part.file.name), lambda file: file.write(text.encode()))


def read_part(folder: Path, tar: str) -> ShardPart | None:
    """The part of a tar, or None when part or tar is missing or they do not belong together."""
    try:
        part = ShardPart.model_validate_json(part_path(folder, tar).read_bytes())
        whole = bool(part.file.location) or (folder / tar).stat().st_size == part.file.bytes
        rows = len(part.index)
    except (FileNotFoundError, ValueError):  # ValidationError is one, and rows that cannot be read
        return None
    return part if whole and part.file.name == tar and rows == part.file.samples else None
