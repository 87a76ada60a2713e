"""LUPerson and LUPerson-NL: people cut out of videos from the web, to train on without or with noisy labels.

Published: LUPerson 4,180,243 images (of about 200 thousand people, not labelled); LUPerson-NL 10,683,716 images of
433,997 identities, which are tracklets and noisy. All is training data, cameras are unknown.

Variants: "folder" and "folder_nl" read a tree of image files, "lmdb" and "lmdb_nl" the authors' LMDB. Without labels
each image is its own identity. With labels (`_nl`) the identity is the folder of an image below the root; in an LMDB
it is the part of the key before its last slash, or, when `keys.tsv` lies beside the LMDB, what its lines
`key<TAB>identity` say.

The authors do not document their keys. Their public loader looks keys up as ASCII text, decodes the value as an image
file, and takes the list of keys and identities from `keys.pkl` beside the LMDB. So here any text is a key and a value
must be a JPEG or PNG file. Pickles are never loaded, as that would execute them: values that are pickled are refused,
and `keys.pkl` of a trusted source has to be turned into `keys.tsv` by its owner. What the keys of the released files
look like, and whether those files hold raw images, is not verified. The library lmdb trusts the inside of a database
file: open those of the authors or your own, not anyone's.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from reid_dist.data.sample import MAX_IMAGE_BYTES
from reid_dist.errors import UserError
from shards.forms.annotation import bounded_lines
from shards.forms.tree import images_below
from shards.raw import Counts, RawImage, RawSample, image_file

CARD: dict[str, Any] = {
    "title": "LUPerson",
    "licence": "signed agreement, academic research only",
    "consent": "people in street videos from the web; consent is not documented",
    "source": "https://github.com/DengpanFu/LUPerson and https://github.com/DengpanFu/LUPerson-NL",
    "citation": "Fu et al., Unsupervised Pre-training for Person Re-identification, CVPR 2021, arXiv:2012.03753; "
    "Fu et al., Large-Scale Pre-training for Person Re-identification with Noisy Labels, CVPR 2022, arXiv:2203.16533",
}

_PLAIN = {"train": Counts(images=4_180_243)}
_NOISY = {"train": Counts(identities=433_997, images=10_683_716)}
EXPECTED = {"folder": _PLAIN, "folder_nl": _NOISY, "lmdb": _PLAIN, "lmdb_nl": _NOISY}

LMDB_FOLDER = "lmdb"
LABELS = "keys.tsv"
_MAX_LINE = 2_000
# Entries that common writers of LMDB data sets add beside the images.
_BOOKKEEPING = frozenset({b"__len__", b"__keys__", b"num-samples"})
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_opening = threading.Lock()


@dataclass(frozen=True, slots=True)
class LmdbImage:
    """An image that is a value of an LMDB.

    Attributes:
        path: folder of the LMDB.
        key: of the entry, text.
        size: of the value, bytes.
    """

    path: Path
    key: str
    size: int

    @property
    def name(self) -> str:
        """The LMDB and the key."""
        return f"{self.path}: {self.key}"

    @property
    def group(self) -> str:
        """Independent."""
        return ""

    def read(self) -> bytes:
        """The value, up to one byte above the cap."""
        with _environment(self.path).begin(buffers=True) as transaction:
            value = transaction.get(self.key.encode())
            if value is None:
                raise UserError(f"{self.name}: no longer there; restore the LMDB")
            return bytes(value[: MAX_IMAGE_BYTES + 1])


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images by path or by key.

    Args:
        root: folder of images of any depth; or the folder that holds `lmdb/`, or that LMDB itself.
        variant: see the head of this file.

    Raises:
        UserError: no images, an LMDB that cannot be opened, a key that is no path, a value that is no JPEG or PNG, or
            no identity where the variant needs one.
    """
    labelled = variant.endswith("_nl")
    if variant.startswith("lmdb"):
        yield from _from_lmdb(root, labelled)
        return
    remedy = "--root is the folder of images; for an LMDB use the variant lmdb or lmdb_nl"
    for path in images_below(root, remedy):
        source = path.relative_to(root).as_posix()
        yield _sample(image_file(path), source, _folder_of(source, str(path)) if labelled else None)


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split


def _sample(image: RawImage, source: str, pid: str | None) -> RawSample:
    return RawSample(image=image, pid=pid, camid=-1, split="train", role="train", captions=(), source=source)


def _folder_of(source: str, origin: str) -> str:
    folder = str(PurePosixPath(source).parent)
    if folder in (".", "/"):
        raise UserError(
            f"{origin}: no folder that could be its identity; use the variant without _nl, or for an LMDB write "
            f"{LABELS} with the lines key<TAB>identity beside it"
        )
    return folder


def _from_lmdb(root: Path, labelled: bool) -> Iterator[RawSample]:
    path = root if (root / "data.mdb").is_file() else root / LMDB_FOLDER
    if not (path / "data.mdb").is_file():
        raise UserError(f"{path}: holds no data.mdb; --root is the LMDB or the folder with {LMDB_FOLDER}/ in it")
    labels = _labels(path) if labelled else None
    with _environment(path).begin(buffers=True) as transaction:
        for raw_key, value in transaction.cursor():
            if bytes(raw_key) in _BOOKKEEPING:
                continue
            key = _text(bytes(raw_key), path)
            image = LmdbImage(path, key, len(value))
            _refuse_other_than_images(bytes(value[:8]), image.name)
            if labels is None:
                yield _sample(image, key, _folder_of(key, image.name) if labelled else None)
            elif key in labels:
                yield _sample(image, key, labels[key])
            else:
                raise UserError(f"{image.name}: not in {LABELS}; add its line or remove the file")


def _text(key: bytes, path: Path) -> str:
    try:
        text = key.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text.strip():
        raise UserError(f"{path}: the key {key[:60]!r} is no text; write the LMDB with the names of images as keys")
    return text


def _refuse_other_than_images(start: bytes, name: str) -> None:
    if start.startswith(_JPEG) or start.startswith(_PNG):
        return
    what = "a pickle, which is never loaded" if start[:1] == b"\x80" else "neither JPEG nor PNG"
    raise UserError(f"{name}: the value is {what}; write the LMDB with the bytes of image files as values")


def _labels(path: Path) -> dict[str, str] | None:
    """The identities of `keys.tsv`, None when there is none."""
    file = next((folder / LABELS for folder in (path, path.parent) if (folder / LABELS).is_file()), None)
    if file is None:
        return None
    labels: dict[str, str] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(bounded_lines(lines, str(file), _MAX_LINE), start=1):
            key, _, identity = line.rstrip("\r\n").partition("\t")
            if not key or not identity or "\t" in identity:
                raise UserError(f"{file}: line {number}: not a key, a tab and an identity; correct the line")
            labels[key] = identity
    return labels


@lru_cache(maxsize=1)
def _cached_environment(path: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise UserError("LMDB is read with the package lmdb: pip install 'reid_dist[lmdb]'") from None
    try:
        # No lock file: the tree is only read and may lie on a medium that cannot be written.
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise UserError(f"{path}: cannot be opened as an LMDB ({error}); get data.mdb again") from None


def _environment(path: Path) -> Any:
    """The opened LMDB; a process can open it only once."""
    with _opening:
        return _cached_environment(path.resolve())
