"""Image-text pairs as img2dataset leaves them: `.jpg`, `.txt` and `.json` by key, in folders or in tars.

Nothing is published that the counts could be compared with: failed downloads are absent, every copy differs. A tar
gives the same samples as the folder with its contents (`00000.tar` and `00000/`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from reid_dist.data.sample import MAX_JSON_BYTES
from reid_dist.errors import UserError
from shards.forms.annotation import files_below
from shards.forms.tree import images_below, is_image
from shards.indexing.safe_tar import Member, walk
from shards.raw import IMAGE_SUFFIXES, Counts, RawImage, RawSample, TarImage, image_file

CARD: dict[str, Any] = {
    "title": "image-text pairs downloaded with img2dataset",
    "licence": "that of each image; the list of links has its own",
    "consent": "images from the web; consent of depicted people is not known",
    "source": "https://github.com/rom1504/img2dataset",
    "citation": "the data set whose links were downloaded",
}

EXPECTED: dict[str, dict[str, Counts]] = {"standard": {}}

_TEXTS = frozenset({".txt", ".json"})


class Facts(BaseModel):
    """What is read of the `.json`."""

    model_config = ConfigDict(extra="ignore")

    caption: str | None = None
    status: str = "success"
    language: str | None = None


@dataclass
class _Row:
    """The members of one key of a tar."""

    image: TarImage | None = None
    suffix: str = ""
    text: bytes | None = None
    facts: bytes | None = None


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """Every image below `root`, in folders and in tars, with its caption; all are training pairs without identity.

    The caption is that of the `.txt`, or else that of the `.json`. Rows that img2dataset marks as failed are left
    out.

    Args:
        root: folder of any depth.
        variant: there is one.

    Raises:
        UserError: no such folder or no images in it, an image without a caption, or a tar that is damaged or holds
            what it should not (see `shards.indexing.safe_tar`).
    """
    tars = tars_below(root)
    for path in tars:
        for sample, _ in tar_samples(root, path):
            yield sample
    yield from _loose(root, bool(tars))


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split


def tars_below(root: Path) -> list[Path]:
    """All tars in a folder of any depth, by path."""
    return files_below(root, ".tar")


def tar_samples(root: Path, path: Path) -> Iterator[tuple[RawSample, Facts]]:
    """The pairs of one tar in the order of its keys' first members, each with what its `.json` tells.

    Raises:
        UserError: see `samples`; also a key with a caption and no image.
    """
    place = path.relative_to(root).with_suffix("").as_posix()
    for key, row in _rows(path).items():
        origin = f"{path}: {key}"
        facts = _facts(row.facts, f"{origin}.json")
        if facts.status != "success":
            continue
        if row.image is None:
            raise UserError(f"{origin}: holds no image; get the tar again, half a pair is lost")
        yield _pair(row.image, _text(row.text, f"{origin}.txt"), facts, f"{place}/{key}{row.suffix}", origin), facts


def _loose(root: Path, may_be_none: bool) -> Iterator[RawSample]:
    if may_be_none and not any(is_image(path.name) for path in root.rglob("*")):
        return
    for path in images_below(root, "--root is the output folder of img2dataset, of folders or tars"):
        facts = _facts(_read_small(path.with_suffix(".json")), str(path.with_suffix(".json")))
        if facts.status == "success":
            text = _text(_read_small(path.with_suffix(".txt")), str(path.with_suffix(".txt")))
            yield _pair(image_file(path), text, facts, path.relative_to(root).as_posix(), str(path))


def _rows(path: Path) -> dict[str, _Row]:
    """What a tar holds for each key, which is a name up to its last dot, as that of a file beside another.

    Other programs cut at the first dot and lose `a.b.jpg` without a word.
    """
    rows: dict[str, _Row] = {}
    others = ""
    for member in walk(path, str(path), MAX_JSON_BYTES):
        key, _, suffix = member.name.rpartition(".")
        suffix = f".{suffix.lower()}"
        if suffix in IMAGE_SUFFIXES or suffix in _TEXTS:
            _take(rows.setdefault(key, _Row()), path, member, suffix)
        else:
            others = member.name
    if others and not rows:
        raise UserError(f"{path}: holds no images and captions ({others[:100]!r} and such); remove it from --root")
    return rows


def _take(row: _Row, path: Path, member: Member, suffix: str) -> None:
    if suffix in IMAGE_SUFFIXES:
        if row.image is not None:
            raise UserError(f"{path}: {member.name}: a second image of its key; write the tar with one for each")
        row.image = TarImage(path, member.name, member.offset, member.size)
        row.suffix = suffix
        return
    if member.size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {member.name}: more than {MAX_JSON_BYTES} bytes; write the tar without it")
    if suffix == ".txt":
        row.text = member.data
    else:
        row.facts = member.data


def _pair(image: RawImage, text: str, facts: Facts, source: str, origin: str) -> RawSample:
    caption = text or (facts.caption or "").strip()
    if not caption:
        raise UserError(f"{origin}: no caption in the .txt or .json beside it; add one or remove the image")
    return RawSample(image=image, pid=None, camid=-1, split="train", role="train", captions=(caption,), source=source)


def _facts(data: bytes | None, name: str) -> Facts:
    if data is None:
        return Facts()
    try:
        return Facts.model_validate_json(data)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"{name}: not JSON of img2dataset ({reason}); remove it and its image") from None


def _text(data: bytes | None, name: str) -> str:
    try:
        return (data or b"").decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text; correct or remove it with its image") from None


def _read_small(path: Path) -> bytes | None:
    """A file beside an image, at most 64 KB: one read that cannot fill the memory. None when there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes; remove it and its image")
    return data
