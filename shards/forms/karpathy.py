"""The annotation form of Karpathy's splits, which COCO and Flickr30k share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from reid_dist.data.sample import Split
from reid_dist.errors import UserError
from shards.forms.annotation import Text, read_json, sentences, validated
from shards.raw import ImageFile, RawSample

_SPLITS: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class Sentence(BaseModel):
    """One sentence; its tokens are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True)

    raw: Text


class Entry(BaseModel):
    """One element of `images`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    filename: Text
    filepath: Text = ""
    split: Literal["train", "restval", "val", "test"]
    sentences: list[Sentence] = Field(min_length=1)
    cocoid: int | None = None


def karpathy_entries(path: Path, remedy: str) -> Iterator[tuple[str, Entry]]:
    """The images that an annotation lists, each with its place for later messages.

    Raises:
        UserError: the file is missing, is not JSON or of another form.
    """
    content = read_json(path, remedy)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise UserError(f"{path}: has no list `images`; {remedy}")
    for number, entry in enumerate(images):
        origin = f"{path}: image {number}"
        yield origin, validated(Entry, entry, origin, remedy)


def karpathy_sample(entry: Entry, image: ImageFile, root: Path) -> RawSample:
    """The sample of an entry: `restval` is trained on; val and test images are the gallery of their sentences."""
    split = _SPLITS[entry.split]
    return RawSample(
        image=image,
        pid=None,
        camid=-1,
        split=split,
        role="train" if split == "train" else "gallery",
        captions=sentences(sentence.raw for sentence in entry.sentences),
        source=image.path.relative_to(root).as_posix(),
    )
