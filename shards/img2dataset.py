"""Image-text pairs as img2dataset leaves them with `--output_format files`: .jpg, .txt and .json by key.

Nothing is published that the counts could be compared with: failed downloads are absent, every copy differs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from reid_dist.data.sample import MAX_JSON_BYTES
from reid_dist.errors import UserError
from shards.raw import IMAGE_SUFFIXES, Counts, RawSample

CARD: dict[str, Any] = {
    "title": "image-text pairs downloaded with img2dataset",
    "licence": "that of each image; the list of links has its own",
    "consent": "images from the web; consent of depicted people is not known",
    "source": "https://github.com/rom1504/img2dataset",
    "citation": "the data set whose links were downloaded",
}

EXPECTED: dict[str, Counts] = {}


class _Facts(BaseModel):
    """What is read of the `.json`."""

    model_config = ConfigDict(extra="ignore")

    caption: str | None = None
    status: str = "success"


def samples(root: Path) -> Iterator[RawSample]:
    """Every image below `root` with its caption, by path; all are training pairs without identity.

    The caption is that of the `.txt`, or else that of the `.json`. Rows that img2dataset marks as failed are left
    out.

    Args:
        root: folder of any depth.

    Raises:
        UserError: no such folder or no images in it, or an image without a caption.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --root is the output folder of img2dataset")
    images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not images:
        raise UserError(f"{root}: holds no images; run img2dataset with --output_format files")
    for image in images:
        facts = _read_facts(image.with_suffix(".json"))
        if facts.status != "success":
            continue
        caption = _read_caption(image.with_suffix(".txt")) or (facts.caption or "").strip()
        if not caption:
            raise UserError(f"{image}: no caption in the .txt or .json beside it; add one or remove the image")
        yield RawSample(
            image=image,
            pid=None,
            camid=-1,
            split="train",
            role="train",
            captions=(caption,),
            source=image.relative_to(root).as_posix(),
        )


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split


def _read_facts(path: Path) -> _Facts:
    if not path.is_file():
        return _Facts()
    try:
        return _Facts.model_validate_json(_read_small(path))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"{path}: not JSON of img2dataset ({reason}); remove it and its image") from None


def _read_caption(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return _read_small(path).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; correct or remove it with its image") from None


def _read_small(path: Path) -> bytes:
    """A file beside an image, at most 64 KB: one read that cannot fill the memory."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes; remove it and its image")
    return data
