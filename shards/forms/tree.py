"""Listing the images of a folder as every converter does it: sorted, and nothing but images."""

from pathlib import Path

from reid_dist.errors import UserError
from shards.raw import IMAGE_SUFFIXES


def is_image(name: str) -> bool:
    """Whether a file name is that of an image.

    `Thumbs.db`, lists and macOS's `._photo.jpg` are not. The last suffix decides, so `0001.jpg.jpg` is one.
    """
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def images_in(folder: Path, remedy: str) -> list[Path]:
    """The images directly in a folder, by name: a file system has an order of its own.

    Args:
        folder: what to list.
        remedy: ends the message when the folder is missing.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; {remedy}")
    images = sorted(path for path in folder.iterdir() if is_image(path.name) and path.is_file())
    if not images:
        raise UserError(f"{folder}: holds no images; unpack the data set again")
    return images


def images_below(folder: Path, remedy: str) -> list[Path]:
    """The images in a folder of any depth, by path; hidden folders are left out.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; {remedy}")
    found = (path for path in folder.rglob("*") if is_image(path.name) and path.is_file())
    images = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not images:
        raise UserError(f"{folder}: holds no images; {remedy}")
    return images
