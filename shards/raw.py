"""What a converter yields, and the checks that paths and keys from a raw tree must pass."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# A tar name of at most 100 bytes needs no extension of the USTAR header; ".json" and a suffix must still fit.
_MAX_KEY = 84


@dataclass(frozen=True)
class RawSample:
    """One image of a raw data set.

    Attributes:
        image: the file.
        pid: raw identity; None for a pair that has no identity.
        camid: camera, counted from 0; -1 is unknown.
        split: train, val or test.
        role: see `reid_dist.data.sample`.
        captions: sentences, may be empty.
        source: path inside the raw tree, with slashes; the sample key is made from it.
    """

    image: Path
    pid: str | None
    camid: int
    split: Split
    role: Role
    captions: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Counts:
    """Identities, images and captions of one part of a data set; None is not compared."""

    identities: int | None = None
    images: int | None = None
    captions: int | None = None


class Converter(Protocol):
    """What each data set's module provides.

    Attributes:
        CARD: licence, consent and terms, source, citation.
        EXPECTED: published counts of each part.
    """

    CARD: dict[str, Any]
    EXPECTED: dict[str, Counts]

    def samples(self, root: Path) -> Iterator[RawSample]:
        """The images of the raw tree in a fixed order.

        Raises:
            UserError: the tree or its annotation is not as expected.
        """

    def part(self, sample: RawSample) -> str:
        """The row of EXPECTED that counts this image."""


def count_parts(samples: Iterable[RawSample], converter: Converter) -> dict[str, Counts]:
    """Count identities, images and captions of each part."""
    identities: dict[str, set[str]] = {}
    images: dict[str, int] = {}
    captions: dict[str, int] = {}
    for sample in samples:
        part = converter.part(sample)
        images[part] = images.get(part, 0) + 1
        captions[part] = captions.get(part, 0) + len(sample.captions)
        known = identities.setdefault(part, set())
        if sample.role not in ("distractor", "junk"):
            known.add(sample.source if sample.pid is None else sample.pid)
    return {part: Counts(len(identities[part]), images[part], captions[part]) for part in images}


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
