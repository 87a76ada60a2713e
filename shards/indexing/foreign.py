"""One tar of image-text pairs made by other software: its samples checked, their index rows and records written.

Understood are the tars of img2dataset and those that open_clip trains on: adjacent members `<key>.jpg` (.jpeg, .png,
.webp) and `<key>.txt` or a `<key>.json` with "caption". Other members are counted and left alone.
"""

import hashlib
import io
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from reid_dist.data.remote import copy_file, is_remote, shown_location
from reid_dist.data.sample import MAX_IMAGE_BYTES, MAX_JSON_BYTES, MAX_PIXELS, Role, Sample, ShardFile, Split
from reid_dist.errors import UserError
from shards.indexing.safe_tar import Member, walk
from shards.workers import Progress
from shards.writing.files import Temporary
from shards.writing.tar_shard import PARTIAL_NAME, IndexRows, ShardPart, write_part

IMAGE_KINDS = frozenset({"jpg", "jpeg", "png", "webp"})
TEXT_KINDS = frozenset({"txt", "json"})

# Of a tar that is copied to the disk first, as it lies behind a URL.
_MAX_TAR_BYTES = 200_000_000_000
_REMEDY = "repair the tar, or skip such samples with --max-bad-fraction"


@dataclass(frozen=True)
class TarJob:
    """A tar to index.

    Attributes:
        name: of the tar in the set.
        location: a path or URL.
        inside: it lies in the set's folder.
        folder: of the set.
        dataset: name of the set.
        split: of its samples.
        skip_bad: bad samples are left out and listed, instead of being an error.
    """

    name: str
    location: str
    inside: bool
    folder: Path
    dataset: str
    split: Split
    skip_bad: bool

    @property
    def records(self) -> Path:
        """Where the records of this tar stand until the merge."""
        return self.folder / PARTIAL_NAME / f"{self.name}.jsonl"


class _Facts(BaseModel):
    """What is read of a `.json`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    caption: str | None = None
    status: str = "success"


class _BadSample(Exception):  # noqa: N818
    """Why one sample cannot be used; the rest of the tar can."""


@dataclass
class _Group:
    """The adjacent members of one key."""

    key: str
    images: list[Member] = field(default_factory=list)
    texts: dict[str, Member] = field(default_factory=dict)
    doubled: str = ""


def index_tar(job: TarJob, progress: Progress) -> ShardPart:
    """Read a tar once, write its records and its part.

    Args:
        job: the tar.
        progress: called with the number of samples done.

    Raises:
        UserError: the tar is damaged or hostile, or a sample is bad and is not to be skipped.
        OSError: it cannot be read, or the folder not be written.
    """
    records = Temporary(job.records)
    try:
        with tempfile.TemporaryFile(dir=job.folder) as copy, _opened(job, copy) as stream:
            hashing = _HashingReader(stream)
            scan = _Scan(job, records.file)
            for group in _groups(walk(cast(IO[bytes], hashing), shown_location(job.location)), scan):
                scan.add(group)
                progress(1)
        file = ShardFile(
            name=job.name,
            sha256=hashing.digest.hexdigest(),
            bytes=hashing.bytes,
            samples=len(scan.rows),
            location="" if job.inside else job.location,
        )
        records.commit()
    finally:
        records.discard()
    part = scan.rows.part(file, skipped=scan.skipped, failed=scan.failed, ignored=dict(scan.ignored))
    write_part(job.folder, part)
    return part


class _Scan:
    """What is collected from one tar."""

    def __init__(self, job: TarJob, records: IO[bytes]) -> None:
        self.job = job
        self.rows = IndexRows()
        self.skipped: list[str] = []
        self.failed = 0
        self.ignored: Counter[str] = Counter()
        self._records = records
        self._position = 0

    def add(self, group: _Group) -> None:
        """Check a sample, append its row and record.

        Raises:
            UserError: it is bad and is not to be skipped.
        """
        try:
            facts = _facts(group)
            if facts.status != "success":
                self.failed += 1
                return
            sample, image = self._sample(group, facts)
            record = sample.model_dump_json().encode()
            if len(record) > MAX_JSON_BYTES:
                raise _BadSample(f"a record of {len(record)} bytes, more than the cap of {MAX_JSON_BYTES}")
        except _BadSample as error:
            if not self.job.skip_bad:
                shown = shown_location(self.job.location)
                raise UserError(f"{shown}: sample {group.key[:200]}: {error}; {_REMEDY}") from None
            self.skipped.append(f"{self.job.name}: sample {group.key[:200]}: {error}")
            return
        self._records.write(record + b"\n")
        self.rows.add(sample, (image.offset, image.data), (self._position, record))
        self._position += len(record) + 1

    def _sample(self, group: _Group, facts: _Facts) -> tuple[Sample, Member]:
        image = _image(group)
        caption = _caption(group) or (facts.caption or "").strip()
        if not caption:
            raise _BadSample("no caption in a .txt or .json right beside its image")
        width, height = _size(image)
        role: Role = "train" if self.job.split == "train" else "gallery"
        try:
            sample = Sample(
                dataset=self.job.dataset,
                # With the tar's name: in many sets the keys of every tar begin anew.
                pid=f"{self.job.dataset}:{self.job.name.removesuffix('.tar')}/{group.key}",
                camid=-1,
                split=self.job.split,
                role=role,
                captions=[caption],
                source=f"{self.job.name}/{image.name}",
                width=width,
                height=height,
                sha256=hashlib.sha256(image.data).hexdigest(),
            )
        except ValidationError as error:
            raise _BadSample(_first_problem(error)) from None
        return sample, image


def _groups(members: Iterator[Member], scan: _Scan) -> Iterator[_Group]:
    """Adjacent members with the same key; the key ends at the first dot of the file name.

    Raises:
        UserError: members of one key stand apart, so that other software would see half samples.
    """
    shown = shown_location(scan.job.location)
    seen: set[str] = set()
    group: _Group | None = None
    for member in members:
        match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)
        kind = match[2].lower() if match else ""
        if match is None or kind not in IMAGE_KINDS | TEXT_KINDS:
            scan.ignored[kind if re.fullmatch(r"[a-z0-9_.-]{1,20}", kind) else "others"] += 1
            continue
        key = match[1]
        if group is None or group.key != key:
            if key in seen:
                raise UserError(
                    f"{shown}: sample {key[:200]}: its members do not stand together, or the key occurs twice; write "
                    f"the tar again with the members of a sample side by side"
                )
            seen.add(key)
            if group is not None:
                yield group
            group = _Group(key)
        _put(group, kind, member)
    if group is not None:
        yield group


def _put(group: _Group, kind: str, member: Member) -> None:
    if kind in IMAGE_KINDS:
        group.images.append(member)
    elif kind in group.texts:  # .txt and .TXT
        group.doubled = kind
    else:
        group.texts[kind] = member


def _image(group: _Group) -> Member:
    if len(group.images) != 1:
        raise _BadSample(f"{len(group.images)} images instead of one" if group.images else "no image (half a sample)")
    image = group.images[0]
    if image.size > MAX_IMAGE_BYTES:
        raise _BadSample(f"an image of {image.size} bytes, more than the cap of {MAX_IMAGE_BYTES}")
    return image


def _facts(group: _Group) -> _Facts:
    if group.doubled:
        raise _BadSample(f"two .{group.doubled} members")
    if "json" not in group.texts:
        return _Facts()
    try:
        return _Facts.model_validate_json(_small(group.texts["json"]))
    except ValidationError as error:
        raise _BadSample(f"its .json is not of the expected form ({_first_problem(error)})") from None


def _caption(group: _Group) -> str:
    if "txt" not in group.texts:
        return ""
    try:
        return _small(group.texts["txt"]).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise _BadSample("its .txt is not UTF-8 text") from None


def _small(member: Member) -> bytes:
    if member.size > MAX_JSON_BYTES:
        kind = member.name.rpartition(".")[2]
        raise _BadSample(f"a .{kind} of {member.size} bytes, more than the cap of {MAX_JSON_BYTES}")
    return member.data


def _size(image: Member) -> tuple[int, int]:
    """Width and height, from the head of the image: decoding is left to `shards.verify`."""
    try:
        with warnings.catch_warnings():
            # Our own cap is far below the one that Pillow warns of.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image.data), formats=("JPEG", "PNG", "WEBP")) as opened:
                width, height = opened.size
    except Exception:  # damaged files raise OSError, but also SyntaxError, struct.error, ...
        raise _BadSample("its image is no JPEG, PNG or WebP, or is damaged") from None
    if width * height > MAX_PIXELS:
        raise _BadSample(f"an image of {width} x {height} pixels, more than the cap of {MAX_PIXELS}")
    return width, height


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _opened(job: TarJob, copy: IO[bytes]) -> IO[bytes]:
    """The tar as a file; what lies behind a URL is copied first, as a broken connection must not end the walk."""
    if is_remote(job.location):
        copy_file(job.location, copy, _MAX_TAR_BYTES)
        copy.seek(0)
        return copy
    return Path(job.location).open("rb")


class _HashingReader:
    """Hashes and counts what is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        return data
