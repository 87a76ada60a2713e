"""MSMT17: people in 15 cameras, from its list files; V1 and V2 (blurred faces) are told apart by their folders.

Published: 1,041 identities with 30,248 images in `list_train.txt` and 2,373 others of the same identities in
`list_val.txt`; 3,060 identities with 11,659 queries and 82,161 gallery images. "32,621 training images" is train and
val together, 7.8 % more data: it has a variant of its own, so that a report names it. The numbers of test identities
begin at 0 again and are other people: identities are called train_0000 and test_0000 here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError
from shards.raw import Counts, RawSample, image_file, inside

CARD: dict[str, Any] = {
    "title": "MSMT17",
    "licence": "signed release agreement, academic research only; no redistribution",
    "consent": "filmed on a campus; consent is not documented. Prefer V2, in which faces are blurred",
    "source": "https://www.pkuvmc.com/dataset.html",
    "citation": "Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018, "
    "arXiv:1711.08565",
}

_TEST = {"query": Counts(3_060, 11_659, cameras=15), "gallery": Counts(3_060, 82_161, cameras=15)}
EXPECTED = {
    "train": {"train": Counts(1_041, 30_248, cameras=15), "val": Counts(1_041, 2_373), **_TEST},
    "train_val": {"train": Counts(1_041, 32_621, cameras=15), **_TEST},
}

VERSIONS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
"""The folders of training and test images in each version."""
_LISTS: tuple[tuple[str, Split, Role], ...] = (
    ("list_train.txt", "train", "train"),
    ("list_val.txt", "val", "gallery"),
    ("list_query.txt", "test", "query"),
    ("list_gallery.txt", "test", "gallery"),
)
_LINE = re.compile(r"(\S.*?)\s+(\d{1,6})")
# 0000_014_04_0303morning_0020_2_ex.jpg: identity, image, camera, day and time, frame, box
_NAME = re.compile(r"\d+_\d+_(\d{2})_\w+\.")


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the lists.

    Images of `list_val.txt` get the role "gallery" in the variant "train": there is no published protocol of
    validation, and no queries.

    Args:
        root: folder with the four lists and the image folders of one version.
        variant: "train", or "train_val" to train on the images of `list_val.txt` too.

    Raises:
        UserError: folders or lists are missing, a line is malformed, or it names a file outside the tree or a missing
            one.
    """
    train_folder, test_folder = VERSIONS[_version(root)]
    for name, split, role in _LISTS:
        if variant == "train_val" and split == "val":
            split, role = "train", "train"
        folder = test_folder if split == "test" else train_folder
        for origin, relative, number in _lines(root / name):
            image = image_file(inside(root / folder, relative, origin), origin)
            yield RawSample(
                image=image,
                pid=f"{'test' if split == 'test' else 'train'}_{number:04d}",
                camid=camera_of(image.path.name, origin=origin),
                split=split,
                role=role,
                captions=(),
                source=f"{folder}/{relative}",
            )


def part(sample: RawSample) -> str:
    """Counts are published per list."""
    return sample.role if sample.split == "test" else sample.split


def camera_of(name: str, default: int | None = None, origin: str = "") -> int:
    """The camera, from 0, that an MSMT17 file name tells.

    Args:
        name: base name of the file.
        default: for a name of another form; None refuses it.
        origin: place of the name, for the message.

    Raises:
        UserError: another form.
    """
    match = _NAME.match(name)
    if match is not None and int(match[1]) >= 1:
        return int(match[1]) - 1
    if default is not None:
        return default
    raise UserError(
        f"{origin}: {name!r} is not an MSMT17 name such as 0000_045_12_0303morning_0006_2.jpg, the camera from 01 on; "
        f"correct the line"
    )


def _version(root: Path) -> str:
    present = [name for name, folders in VERSIONS.items() if all((root / folder).is_dir() for folder in folders)]
    if len(present) == 1:
        return present[0]
    both = " or ".join(f"{' and '.join(folders)} ({name})" for name, folders in VERSIONS.items())
    if present:
        raise UserError(f"{root}: holds the folders of both versions; keep {both}")
    raise UserError(f"{root}: holds neither {both}; --root is the MSMT17 folder with these and the list files")


def _lines(path: Path) -> Iterator[tuple[str, str, int]]:
    """Place, file and identity of each line of a list."""
    if not path.is_file():
        raise UserError(f"{path}: missing; --root is the MSMT17 folder that holds the four list_*.txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; get the file again") from None
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line.strip())
        if match is None and line.strip():
            raise UserError(f"{path}: line {number}: {line[:100]!r} is not a file and an identity; correct the line")
        if match is not None:
            yield f"{path}: line {number}", match[1], int(match[2])
