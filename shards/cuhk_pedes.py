"""CUHK-PEDES: people with sentences, from its `reid_raw.json`.

Published (train / val / test): 11,003 / 1,000 / 1,000 identities, 34,054 / 3,078 / 3,074 images,
68,126 / 6,158 / 6,156 captions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reid_dist.errors import UserError
from shards.raw import Counts, RawSample, inside

CARD: dict[str, Any] = {
    "title": "CUHK-PEDES",
    "licence": "on request from the authors, academic research only; no redistribution",
    "consent": "people in images of CUHK03, Market-1501, CUHK-SYSU, VIPeR, CUHK01; consent is not documented",
    "source": "https://github.com/ShuangLI59/Person-Search-with-Natural-Language-Description",
    "citation": "Li et al., Person Search with Natural Language Description, CVPR 2017, arXiv:1702.05729",
    "overlap": "holds images of Market-1501 and CUHK03: do not train on one and test on the other",
}

EXPECTED = {
    "train": Counts(11_003, 34_054, 68_126),
    "val": Counts(1_000, 3_078, 6_158),
    "test": Counts(1_000, 3_074, 6_156),
}

ANNOTATION = "reid_raw.json"


class _Entry(BaseModel):
    """One element of `reid_raw.json`; `processed_tokens` is left alone."""

    model_config = ConfigDict(extra="ignore", strict=True)

    split: Literal["train", "val", "test"]
    captions: list[str] = Field(min_length=1)
    file_path: str
    id: int


def samples(root: Path) -> Iterator[RawSample]:
    """The images in the order of the annotation.

    Val and test images have the role "gallery"; each of their captions is a query of text-to-image retrieval. Cameras
    are not annotated.

    Args:
        root: folder with `reid_raw.json` and `imgs/`.

    Raises:
        UserError: the annotation is missing or malformed, or names a file outside the tree or a missing one.
    """
    path = root / ANNOTATION
    for number, entry in enumerate(_read(path)):
        origin = f"{path}: entry {number}"
        image = inside(root / "imgs", entry.file_path, origin)
        if not image.is_file():
            raise UserError(f"{origin}: {image} does not exist; unpack the images completely or remove the entry")
        yield RawSample(
            image=image,
            pid=str(entry.id),
            camid=-1,
            split=entry.split,
            role="train" if entry.split == "train" else "gallery",
            captions=tuple(caption for caption in entry.captions if caption.strip()),
            source=f"imgs/{entry.file_path}",
        )


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split


def _read(path: Path) -> list[_Entry]:
    if not path.is_file():
        raise UserError(f"{path}: missing; --root is the CUHK-PEDES folder that holds {ANNOTATION} and imgs/")
    try:
        return TypeAdapter(list[_Entry]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: not in the form of {ANNOTATION} (entry {place}: {first['msg']}); get the file again"
        ) from None
