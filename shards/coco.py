"""COCO captions, from the official `captions_{train,val}2017.json` or from Karpathy's `dataset_coco.json`.

Published: official 118,287 / 5,000 images with 591,753 / 25,014 captions (train / val); Karpathy 113,287 / 5,000 /
5,000 images with 566,747 / 25,010 / 25,010 sentences (train with restval / val / test). Most images have five, some
more. Images have no identity. The two forms divide the same photographs differently: train on one, test on the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from reid_dist.data.sample import Split
from reid_dist.errors import UserError
from shards.forms.annotation import Text, read_json, sentences, validated
from shards.forms.karpathy import Entry, karpathy_entries, karpathy_sample
from shards.raw import Counts, ImageFile, RawSample, image_file, inside

CARD: dict[str, Any] = {
    "title": "COCO captions",
    "licence": "annotations CC BY 4.0; images: Flickr terms of use, each its own",
    "consent": "photographs from Flickr; consent of depicted people is not known",
    "source": "https://cocodataset.org",
    "citation": "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv:1504.00325; "
    "split `karpathy`: Karpathy and Fei-Fei, CVPR 2015",
}

EXPECTED = {
    "official": {
        "train": Counts(images=118_287, captions=591_753),
        "val": Counts(images=5_000, captions=25_014),
    },
    "karpathy": {
        "train": Counts(images=113_287, captions=566_747),
        "val": Counts(images=5_000, captions=25_010),
        "test": Counts(images=5_000, captions=25_010),
    },
}

OFFICIAL: tuple[tuple[str, Split], ...] = (("train2017", "train"), ("val2017", "val"))
KARPATHY = "dataset_coco.json"
_REMEDY = "get the file again"
_ROOT = "--root is the folder that holds annotations/, train2017/ and val2017/"


class _Image(BaseModel):
    """One element of `images`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: int
    file_name: Text


class _Annotation(BaseModel):
    """One element of `annotations`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    image_id: int
    caption: Text


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation.

    Val and test images have the role "gallery"; each of their captions is a query of text-to-image retrieval.

    Args:
        root: folder with the annotation (there or in `annotations/`) and the folders of images (there or in
            `images/`): those of 2017, which serve Karpathy's annotation too, or for it those of 2014.
        variant: `official` or `karpathy`.

    Raises:
        UserError: no annotation of this variant, a malformed one, one that names a file outside the tree or a
            missing one, or an image without a caption.
    """
    if variant == "karpathy":
        yield from _karpathy(root)
        return
    found = [(_annotation(root, f"captions_{name}.json"), name, split) for name, split in OFFICIAL]
    if not any(path.is_file() for path, _, _ in found):
        other = f"; for its {KARPATHY} choose the variant karpathy" if _annotation(root, KARPATHY).is_file() else ""
        raise UserError(f"{root}: holds neither captions_train2017.json nor captions_val2017.json{other}; {_ROOT}")
    for path, name, split in found:
        if path.is_file():
            yield from _official(root, path, name, split)


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split


def _official(root: Path, path: Path, name: str, split: Split) -> Iterator[RawSample]:
    content = read_json(path, _REMEDY)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{path}: has no lists `images` and `annotations`; {_REMEDY}")
    captions: dict[int, list[str]] = {}
    for number, raw in enumerate(content["annotations"]):
        annotation = validated(_Annotation, raw, f"{path}: annotation {number}", _REMEDY)
        captions.setdefault(annotation.image_id, []).append(annotation.caption)
    for number, raw in enumerate(content["images"]):
        origin = f"{path}: image {number}"
        entry = validated(_Image, raw, origin, _REMEDY)
        texts = sentences(captions.pop(entry.id, ()))
        if not texts:
            raise UserError(f"{origin}: id {entry.id} has no caption; {_REMEDY}")
        image = image_file(inside(_folder(root, name), entry.file_name, origin), origin)
        yield _sample(root, image, split, texts)
    if captions:
        raise UserError(f"{path}: captions of image {next(iter(captions))}, which is not among its images; {_REMEDY}")


def _sample(root: Path, image: ImageFile, split: Split, captions: tuple[str, ...]) -> RawSample:
    return RawSample(
        image=image,
        pid=None,
        camid=-1,
        split=split,
        role="train" if split == "train" else "gallery",
        captions=captions,
        source=image.path.relative_to(root).as_posix(),
    )


def _karpathy(root: Path) -> Iterator[RawSample]:
    path = _annotation(root, KARPATHY)
    for origin, entry in karpathy_entries(path, f"{_ROOT}, and the variant karpathy needs {KARPATHY} there"):
        yield karpathy_sample(entry, _karpathy_image(root, entry, origin), root)


def _karpathy_image(root: Path, entry: Entry, origin: str) -> ImageFile:
    """The file of 2014 that the entry names, or the same photograph under its name of 2017."""
    named = inside(root, f"{entry.filepath}/{entry.filename}" if entry.filepath else entry.filename, origin)
    places = [named, root / "images" / named.relative_to(root)]
    if entry.cocoid is not None:
        places += [_folder(root, name) / f"{entry.cocoid:012d}.jpg" for name, _ in OFFICIAL]
    return image_file(next((path for path in places if path.is_file()), named), origin)


def _annotation(root: Path, name: str) -> Path:
    inner = root / "annotations" / name
    return inner if inner.is_file() else root / name


def _folder(root: Path, name: str) -> Path:
    inner = root / "images" / name
    return inner if inner.is_dir() else root / name
