"""Anyone's own images of people: one folder for each identity.

Two layouts. Without splits, everything is training data:

    root/<identity>/*.jpg

With splits, as soon as one of the four names stands in the root; those that are missing are empty:

    root/{train,val,query,gallery}/<identity>/*.jpg

`query` and `gallery` are the test set and belong together. In `val` the first image by name of each identity is a
query and the others are gallery. The name of an identity's folder is the identity, in every split: the same name in
query and gallery is the same person, and a person must not be both in train and in the test set.

The camera is the number in a part `_c<digits>` of the file name (`0001_c3.jpg`, `anna_c12_frame7.jpg`; Market-1501's
`_c3s1` too), taken as it is written. Without one the camera is unknown: -1.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError
from shards.forms.tree import images_in
from shards.raw import Counts, RawSample, image_file

CARD: dict[str, Any] = {
    "title": "folders of images, one for each identity",
    "licence": "that of the images",
    "consent": "to be ensured by whoever collected the images",
    "source": "local files",
    "citation": "none",
}

EXPECTED: dict[str, dict[str, Counts]] = {"standard": {}}

_SPLITS: dict[str, tuple[Split, Role]] = {
    "train": ("train", "train"),
    "val": ("val", "gallery"),
    "query": ("test", "query"),
    "gallery": ("test", "gallery"),
}
_CAMERA = re.compile(r"_c(\d+)(?:s\d+)?(?=[_.])")
# Pictures that are not read: left out without a word, they would be missed too late.
_UNREADABLE = frozenset({".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".ppm"})


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images by split, identity and name.

    Args:
        root: see the head of this file.
        variant: there is one.

    Raises:
        UserError: folders beside or inside those of the layout, pictures of a format that is not read, queries
            without a gallery, or an identity that is trained on and tested.
    """
    present = [name for name in _SPLITS if (root / name).is_dir()]
    if ("query" in present) != ("gallery" in present):
        raise UserError(f"{root}: query/ and gallery/ belong together; add the missing one or remove the other")
    if not present:
        yield from _split(root, root, "train", "train")
        return
    foreign = [path.name for path in _folders(root) if path.name not in _SPLITS]
    if foreign:
        raise UserError(
            f"{root}: {foreign[0]}/ stands beside {present[0]}/; with splits only {', '.join(_SPLITS)} belong there"
        )
    _refuse_trained_test(root)
    for name in present:
        yield from _split(root, root / name, *_SPLITS[name])


def part(sample: RawSample) -> str:
    """One row for each split, with query and gallery of the test set apart."""
    return sample.role if sample.split == "test" else sample.split


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _split(root: Path, folder: Path, split: Split, role: Role) -> Iterator[RawSample]:
    people = _folders(folder)
    if not people:
        raise UserError(f"{folder}: holds no folders; put the images of each identity into a folder named after it")
    for person in people:
        _refuse_unread(person)
        for number, image in enumerate(images_in(person, "")):
            match = _CAMERA.search(image.name)
            if match is not None and int(match[1]) >= 2**31:
                raise UserError(f"{image}: camera {match[1]} is out of range; rename the file")
            yield RawSample(
                image=image_file(image),
                pid=person.name,
                camid=int(match[1]) if match else -1,
                split=split,
                role="query" if split == "val" and number == 0 else role,
                captions=(),
                source=image.relative_to(root).as_posix(),
            )


def _refuse_unread(person: Path) -> None:
    """Refuse what would be left out silently."""
    for path in sorted(person.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            raise UserError(f"{path}: a folder inside the folder of an identity; move its images up or remove it")
        if path.suffix.lower() in _UNREADABLE:
            raise UserError(f"{path}: {path.suffix} is not read; convert it to JPEG, PNG or WebP")


def _refuse_trained_test(root: Path) -> None:
    def names(folder: str) -> set[str]:
        return {path.name for path in _folders(root / folder)} if (root / folder).is_dir() else set()

    shared = sorted(names("train") & (names("query") | names("gallery") | names("val")))
    if shared:
        raise UserError(
            f"{root}: identity {shared[0]!r} is in train/ and in a split to test on; rename one if these are two people"
        )
