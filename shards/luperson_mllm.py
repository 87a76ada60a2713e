"""LUPerson-MLLM: a million people of LUPerson, each described by two language models, twice.

The captions are four files `{Ts,Td}-{qwen,shikra}.json` (static and dynamic templates), each one object
`{path: caption}`; path and image meet in the base name. Every image is its own identity. Captions in which the
template shows through (`description]`, or a `<`) are left out and counted; the authors replace them by one drawn
from the others. Published are "one million" images with four captions each, too round to be compared with.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from reid_dist.errors import UserError
from shards.forms.annotation import Text, read_json, sentences, validated
from shards.forms.tree import images_in
from shards.raw import Counts, RawSample, image_file

CARD: dict[str, Any] = {
    "title": "LUPerson-MLLM",
    "licence": "images: that of LUPerson, academic research only; captions: see the source",
    "consent": "people in street videos from the web (LUPerson); consent is not documented",
    "source": "https://github.com/WentaoTan/MLLM4Text-ReID",
    "citation": "Tan et al., Harnessing the Power of MLLMs for Transferable Text-to-Image Person ReID, CVPR 2024, "
    "arXiv:2405.04940",
    "contains": ["luperson"],
}

EXPECTED = {"standard": {"train": Counts()}}

CAPTION_FILES = ("Ts-qwen.json", "Td-qwen.json", "Ts-shikra.json", "Td-shikra.json")
IMAGES = "LUPerson-MLLM"
_LEAKS = ("description]", "<")


class _Caption(BaseModel):
    """One value of a caption file."""

    model_config = ConfigDict(strict=True)

    caption: Text


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images by name. Those without any usable caption are left out and counted.

    Args:
        root: folder with `LUPerson-MLLM/` and the four caption files, the latter there or in `caption/`.
        variant: there is one.

    Raises:
        UserError: a caption file or the folder of images is missing, a file is not `{path: caption}`, two of its
            paths have one base name, or no image has a caption.
    """
    images = images_in(root / IMAGES, f"--root is the folder that holds {IMAGES}/ and the four caption files")
    captions = [_read(_caption_file(root, name)) for name in CAPTION_FILES]
    leaks = without = used = 0
    for path in images:
        found = sentences(texts[path.name] for texts in captions if path.name in texts)
        clean = tuple(text for text in found if not any(leak in text for leak in _LEAKS))
        leaks += len(found) - len(clean)
        without += not clean
        used += bool(clean)
        if clean:
            yield _sample(path, clean)
    if not used:
        raise UserError(f"{root / IMAGES}: none of its images has a caption; the caption files belong to other images")
    print(f"{root}: left out {leaks} captions that show their template and {without} images without a caption")


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split


def _sample(path: Path, captions: tuple[str, ...]) -> RawSample:
    return RawSample(
        image=image_file(path),
        pid=None,
        camid=-1,
        split="train",
        role="train",
        captions=captions,
        source=f"{IMAGES}/{path.name}",
    )


def _caption_file(root: Path, name: str) -> Path:
    inner = root / "caption" / name
    return inner if inner.is_file() else root / name


def _read(path: Path) -> dict[str, str]:
    """The captions of one file by base name."""
    content = read_json(path, "get all four caption files, or a damaged one again")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object {{path: caption}}; get the file again")
    captions: dict[str, str] = {}
    for place, caption in content.items():
        name = PurePosixPath(place).name
        origin = f"{path}: {place[:200]!r}"
        if name in captions:
            raise UserError(f"{origin}: a second path with this base name; remove one of them")
        captions[name] = validated(_Caption, {"caption": caption}, origin, "correct or remove the entry").caption
    return captions
