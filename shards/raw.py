"""What a converter yields, and the checks that paths and keys from a raw tree must pass."""

import hashlib
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from reid_dist.data.sample import MAX_IMAGE_BYTES, Role, Split
from reid_dist.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# A tar name of at most 100 bytes needs no extension of the USTAR header; ".json" and a suffix must still fit.
_MAX_KEY = 84


class RawImage(Protocol):
    """Where the bytes of one raw image are; small, and fit to be sent to a worker process.

    Attributes:
        name: what error messages call it: a file, or a place inside one.
        size: bytes, roughly; shards are planned by it before an image is read.
        group: images that are only cheap to read together (a parquet row group) name their group here; "" is
            independent.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def size(self) -> int:
        """See above."""

    @property
    def group(self) -> str:
        """See above."""

    def read(self) -> bytes:
        """The image file, at most MAX_IMAGE_BYTES + 1 bytes of it.

        Raises:
            UserError: it cannot be read.
        """


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is a file of its own."""

    path: Path
    size: int

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def group(self) -> str:
        """Independent."""
        return ""

    def read(self) -> bytes:
        """The file's bytes, up to one above the cap."""
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); restore the file or remove its entry"
            ) from None


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image inside a tar that is not compressed.

    Attributes:
        path: the tar.
        member: name of the entry.
        offset: of its content.
        size: of its content, bytes.
    """

    path: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """The tar and the entry."""
        return f"{self.path}: {self.member}"

    @property
    def group(self) -> str:
        """Independent."""
        return ""

    def read(self) -> bytes:
        """The entry's bytes, up to one above the cap."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(min(self.size, MAX_IMAGE_BYTES + 1))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); restore the file") from None
        if len(data) < min(self.size, MAX_IMAGE_BYTES + 1):
            raise UserError(f"{self.name}: the tar ends inside it; get the file again")
        return data


def image_file(path: Path, origin: str = "") -> ImageFile:
    """The image of a path that must exist.

    Args:
        path: the file.
        origin: place of the entry that names it, for the message; empty: none does.

    Raises:
        UserError: there is no such file.
    """
    try:
        state = path.stat()
    except OSError:
        state = None
    if state is None or not stat.S_ISREG(state.st_mode):
        named = f"{origin}: " if origin else ""
        raise UserError(f"{named}{path} does not exist; unpack the images completely or remove the entry")
    return ImageFile(path, state.st_size)


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image of a raw data set.

    Attributes:
        image: where its bytes are.
        pid: raw identity; None for a pair that has no identity.
        camid: camera, counted from 0; -1 is unknown.
        split: train, val or test.
        role: see `reid_dist.data.sample`.
        captions: sentences, may be empty.
        source: path inside the raw tree, with slashes; the sample key is made from it.
    """

    image: RawImage
    pid: str | None
    camid: int
    split: Split
    role: Role
    captions: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Counts:
    """Identities, images, captions and cameras of one part of a data set; None is not published and not compared."""

    identities: int | None = None
    images: int | None = None
    captions: int | None = None
    cameras: int | None = None


class Converter(Protocol):
    """What each data set's module provides.

    Attributes:
        CARD: licence, consent and terms, source, citation; `contains` lists the converters of the sets whose people
            it shows as well.
        EXPECTED: for each variant of the set, the published counts of each part; the first variant is the default.
            Empty counts where nothing is published.
    """

    CARD: dict[str, Any]
    EXPECTED: dict[str, dict[str, Counts]]

    def samples(self, root: Path, variant: str) -> Iterator[RawSample]:
        """The images of the raw tree in a fixed order, without reading them.

        Args:
            root: the unpacked raw data set.
            variant: one of EXPECTED.

        Raises:
            UserError: the tree or its annotation is not as expected.
        """

    def part(self, sample: RawSample) -> str:
        """The row of EXPECTED that counts this image."""


def count_parts(samples: Iterable[RawSample], converter: Converter) -> dict[str, Counts]:
    """Count identities, images, captions and cameras (those known) of each part."""
    identities: dict[str, set[str]] = {}
    cameras: dict[str, set[int]] = {}
    images: dict[str, int] = {}
    captions: dict[str, int] = {}
    for sample in samples:
        part = converter.part(sample)
        images[part] = images.get(part, 0) + 1
        captions[part] = captions.get(part, 0) + len(sample.captions)
        seen = cameras.setdefault(part, set())
        if sample.camid >= 0:
            seen.add(sample.camid)
        known = identities.setdefault(part, set())
        if sample.role not in ("distractor", "junk"):
            known.add(sample.source if sample.pid is None else sample.pid)
    return {part: Counts(len(identities[part]), images[part], captions[part], len(cameras[part])) for part in images}


def inside(root: Path, relative: str, origin: str) -> Path:
    """The path of a file that an annotation names, which must lie inside the tree.

    Args:
        root: folder that the name is relative to.
        relative: name from the annotation, with slashes.
        origin: what the error message calls the place of the name.

    Raises:
        UserError: the name is empty, absolute, leaves the folder or holds a backslash or control character.
    """
    path = PurePosixPath(relative)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00-\x1f]", relative):
        raise UserError(f"{origin}: {relative[:200]!r} is not a path inside {root}; correct the annotation")
    return root.joinpath(*path.parts)


def sample_key(source: str, taken: set[str]) -> str:
    """A key for a source path, `[A-Za-z0-9_-]{1,95}`, added to `taken`.

    It is the path without its suffix and with other characters as underscores. Where that is cut or already taken, a
    hash of the path follows.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", str(PurePosixPath(source).with_suffix("")))
    if key in taken or len(key) > _MAX_KEY:
        key = f"{key[:_MAX_KEY]}-{hashlib.sha256(source.encode()).hexdigest()[:10]}"
    if key in taken:
        raise UserError(f"{source}: named twice in the raw data; remove one of the entries")
    taken.add(key)
    return key
