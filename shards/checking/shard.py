"""Checking one tar of a shard set: its hash, its members, and every sample in it against its row of the index."""

import hashlib
import io
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from reid_dist.data.remote import check_location, copy_file, is_remote
from reid_dist.data.sample import KEY_PATTERN, MAX_IMAGE_BYTES, RECORDS_NAME, Sample, ShardFile, content_digest
from reid_dist.errors import UserError
from shards.checking.captions import TokenizerChoice, make_tokenizer
from shards.checking.sample import decoded_size, differences, published_part, read_record
from shards.indexing.safe_tar import BLOCK, Member, walk
from shards.workers import Progress

_TEXTS = 1024


@dataclass(frozen=True)
class ShardJob:
    """One tar to check.

    Attributes:
        number: of the tar in the set.
        folder: of the set.
        shard: what the manifest says of the tar.
        index: its rows. Shape: (N,).
        pids: identity of each row.
        foreign: the records stand in `records.jsonl`, and the tar may hold other members.
        indexed: false where there is no index that could be read; samples are then not looked at.
        converter: its name, for counting published parts; empty: none.
        tokenizer: None leaves captions uncut.
    """

    number: int
    folder: Path
    shard: ShardFile
    index: npt.NDArray[Any]
    pids: list[str]
    foreign: bool
    indexed: bool = True
    converter: str = ""
    tokenizer: TokenizerChoice | None = None


class Damage(NamedTuple):
    """One thing that is wrong.

    Attributes:
        place: shard and sample, or file; empty: the set.
        what: one phrase.
    """

    place: str
    what: str


@dataclass
class ShardFindings:
    """What was found in one tar.

    Attributes:
        number: of the tar in the set.
        damage: in the order of the tar.
        keys: digest of each sample's key, 0 where it has none. Shape: (N,).
        parts: part of the published counts that each sample belongs to; "" is unknown.
        caption_rows: for each caption the row of its image within this shard.
        caption_digests: equal for sentences that differ in case and white space only.
        caption_words: number of words.
        cut: captions that the tokenizer would cut.
        beside: members of a foreign tar that no row names.
    """

    number: int
    damage: list[Damage] = field(default_factory=list)
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    parts: list[str] = field(default_factory=list)
    caption_rows: "array[int]" = field(default_factory=lambda: array("i"))
    caption_digests: "array[int]" = field(default_factory=lambda: array("Q"))
    caption_words: "array[int]" = field(default_factory=lambda: array("i"))
    cut: int = 0
    beside: int = 0


class Found(NamedTuple):
    """A sample as it stands in the tar: its key and where image and record begin."""

    key: str
    image: Member
    record: Member | None


def check_shard(job: ShardJob, progress: Progress) -> ShardFindings:
    """Read one tar from its first to its last byte and compare it with manifest and index.

    Args:
        job: which.
        progress: called with the number of samples checked.
    """
    return _Check(job, progress).run()


class _Check:
    """The state of one check."""

    def __init__(self, job: ShardJob, progress: Progress) -> None:
        self.job = job
        self.progress = progress
        count = len(job.index)
        self.found = ShardFindings(job.number, keys=np.zeros(count, np.uint64), parts=[""] * count)
        self.rows = {int(offset): row for row, offset in enumerate(job.index["image_offset"].tolist())}
        self.seen = np.zeros(count, dtype=bool)
        self.captions: list[str] = []

    def run(self) -> ShardFindings:
        shard, place = self.job.shard, f"shard {self.job.shard.name}"
        try:
            with open_tar(self.job.folder, shard) as file, self._records() as records:
                hashing = _Hashing(file)
                broken = self._walk(hashing, records)
                size, digest = hashing.finish()
                if size != shard.bytes:
                    self._damage("", f"{size} bytes, the manifest says {shard.bytes}")
                elif digest != shard.sha256:
                    self._damage("", "its sha256 is not the one in the manifest")
                self._rest(broken, file, records)
        except UserError as error:
            self.found.damage.append(Damage(place, str(error)))
        except OSError as error:
            self.found.damage.append(Damage(place, f"cannot be read ({error.strerror or error})"))
        self._count_cuts()
        return self.found

    def _damage(self, key: str, what: str) -> None:
        sample = f", sample {key}" if key else ""
        self.found.damage.append(Damage(f"shard {self.job.shard.name}{sample}", what))

    def _records(self) -> IO[bytes]:
        return (self.job.folder / RECORDS_NAME).open("rb") if self.job.foreign else io.BytesIO()

    def _walk(self, stream: "_Hashing", records: IO[bytes]) -> bool:
        """Check the samples of the tar in order; whether the tar was broken."""
        name = f"{self.job.folder}, shard {self.job.shard.name}"
        members = walk(cast(IO[bytes], stream), name)
        try:
            for sample in self._foreign(members) if self.job.foreign else self._own(members):
                row = self.rows.get(sample.image.offset)
                if row is None and self.job.indexed:
                    self._damage(sample.key, "is not in the index")
                elif row is not None and not self.seen[row]:
                    self.seen[row] = True
                    record = self._record(row, sample.record, records)
                    self._sample(row, sample.key, sample.image.data, record)
        except UserError as error:
            self._damage("", str(error).removeprefix(f"{name}: "))
            return True
        return False

    def _own(self, members: Iterable[Member]) -> Iterator[Found]:
        """The samples of a tar of ours: `<key>.jpg` and, next to it, `<key>.json`."""
        image: Member | None = None
        for member in members:
            key, _, suffix = member.name.rpartition(".")
            if not KEY_PATTERN.fullmatch(key) or suffix not in ("jpg", "json"):
                self._damage(member.name, "is no <key>.jpg or <key>.json with a key of [A-Za-z0-9_-]")
                continue
            if suffix == "json" and image is not None and image.name == f"{key}.jpg":
                yield Found(key, image, member)
                image = None
                continue
            self._half(image)
            image = member if suffix == "jpg" else None
            if suffix == "json":
                self._damage(key, "a record without its image before it (half a sample, or members out of order)")
        self._half(image)

    def _half(self, image: Member | None) -> None:
        if image is not None:
            key = image.name.rpartition(".")[0]
            self._damage(key, "an image without its record behind it (half a sample, or members out of order)")
            row = self.rows.get(image.offset)
            if row is not None:
                self.seen[row] = True

    def _foreign(self, members: Iterable[Member]) -> Iterator[Found]:
        """The images that the index names; texts and failed downloads beside them are counted."""
        for member in members:
            if member.offset in self.rows:
                yield Found(member.name.rpartition(".")[0], member, None)
            else:
                self.found.beside += 1

    def _record(self, row: int, member: Member | None, records: IO[bytes]) -> bytes:
        entry = self.job.index[row]
        if member is None:
            return _at(records, int(entry["json_offset"]), int(entry["json_size"]))
        if member.offset != entry["json_offset"]:
            return b""
        return member.data

    def _rest(self, broken: bool, file: IO[bytes], records: IO[bytes]) -> None:
        """The rows that the walk did not come to: behind a break they are looked for where the index says."""
        missing = np.flatnonzero(~self.seen).tolist()
        if not broken:
            for row in missing:
                self._damage("", f"no image begins at byte {self.job.index[row]['image_offset']}, as the index says")
            return
        lost = 0
        for row in missing:
            found = self._fetch(row, file, records)
            if found is None:
                lost += 1
            else:
                self._sample(row, *found)
        if lost:
            self._damage("", f"{lost} of its samples are not there any more")

    def _fetch(self, row: int, file: IO[bytes], records: IO[bytes]) -> tuple[str, bytes, bytes] | None:
        entry = self.job.index[row]
        head = _at(file, int(entry["image_offset"]) - BLOCK, BLOCK)
        image = _at(file, int(entry["image_offset"]), int(entry["image_size"]))
        place = records if self.job.foreign else file
        record = _at(place, int(entry["json_offset"]), int(entry["json_size"]))
        if len(image) != entry["image_size"] or len(record) != entry["json_size"]:
            return None
        name = head[:100].split(b"\0", 1)[0].decode("ascii", "replace")
        return name.rpartition(".")[0], image, record

    def _sample(self, row: int, key: str, image: bytes, record: bytes) -> None:
        """Check one sample's contents and keep what is counted."""
        entry = self.job.index[row]
        self.progress(1)
        self.found.keys[row] = content_digest(key.encode())
        intact = True
        for kind, data in (("image", image), ("record", record)):
            column = "json" if kind == "record" else kind
            if len(data) != entry[f"{column}_size"] or content_digest(data) != entry[f"{column}_digest"]:
                self._damage(key, f"the {kind} is not the one of the index (changed or damaged)")
                intact = False
        size = self._decoded(key, image)
        try:
            sample = read_record(record)
        except UserError as error:
            self._damage(key, str(error))
            return
        for what in differences(sample, entry, self.job.pids[row]):
            self._damage(key, what)
        if intact and hashlib.sha256(image).hexdigest() != sample.sha256:
            self._damage(key, "the image's sha256 is not the one in its record")
        if size is not None and size != (sample.width, sample.height):
            actual, stated = f"{size[0]} x {size[1]}", f"{sample.width} x {sample.height}"
            self._damage(key, f"the image has {actual} pixels, its record says {stated}")
        self._keep(row, sample)

    def _decoded(self, key: str, image: bytes) -> tuple[int, int] | None:
        try:
            return decoded_size(image)
        except UserError as error:
            self._damage(key, str(error))
            return None

    def _keep(self, row: int, sample: Sample) -> None:
        found = self.found
        found.parts[row] = published_part(self.job.converter, sample)
        for caption in sample.captions:
            words = caption.split()
            found.caption_rows.append(row)
            found.caption_digests.append(content_digest(" ".join(words).lower().encode()))
            found.caption_words.append(len(words))
        if self.job.tokenizer is not None:
            self.captions += sample.captions
            if len(self.captions) >= _TEXTS:
                self._count_cuts()

    def _count_cuts(self) -> None:
        if self.captions and self.job.tokenizer is not None:
            share = make_tokenizer(self.job.tokenizer).truncated_share(self.captions)
            self.found.cut += round(share * len(self.captions))
        self.captions = []


class _Hashing(io.RawIOBase):
    """A stream that hashes what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._size += len(data)
        return data

    def finish(self) -> tuple[int, str]:
        """Read to the end; size and sha256 of the whole."""
        while self.read(1 << 20):
            pass
        return self._size, self._digest.hexdigest()


def open_tar(folder: Path, shard: ShardFile) -> IO[bytes]:
    """A tar of a set, open at its first byte, wherever it lies: what is far away is copied to a temporary file.

    Raises:
        OSError: it is not there.
        UserError: it cannot be fetched.
    """
    location = check_location(shard.location) if shard.location else str(folder / shard.name)
    if not is_remote(location):
        return open(location, "rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        copy_file(location, file, shard.bytes)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _at(file: IO[bytes], offset: int, size: int) -> bytes:
    """Some bytes of a file; nothing where the index says what cannot be."""
    if offset < 0 or not 0 <= size <= MAX_IMAGE_BYTES:
        return b""
    file.seek(offset)
    return file.read(size)
