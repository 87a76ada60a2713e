"""MALS (APTM): generated pictures of people with one sentence each, from the files in its `gene_attrs/`.

Published: 1,510,330 pairs. No identity has a second image, so every image is its own. All is training data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from reid_dist.errors import UserError
from shards.forms.annotation import Text, entries, sentences
from shards.raw import Counts, RawSample, image_file, inside

CARD: dict[str, Any] = {
    "title": "MALS",
    "licence": "research only, no commercial use",
    "consent": "generated pictures (diffusion, from captions of CUHK-PEDES and ICFG-PEDES); shows no real people",
    "source": "https://github.com/Shuyu-XJTU/APTM",
    "citation": "Yang et al., Towards Unified Text-based Person Retrieval: A Large-scale Multi-Attribute and Language "
    "Search Benchmark, ACM MM 2023, arXiv:2306.02898",
}

EXPECTED = {"standard": {"train": Counts(images=1_510_330, captions=1_510_330)}}

ATTRIBUTES = 27


class _Entry(BaseModel):
    """One element of a `g_*_attrs.json`; -1 among the labels is unknown."""

    model_config = ConfigDict(extra="ignore", strict=True)

    image: Text
    caption: Text = Field(pattern=r"\S")
    image_id: str
    label: list[Literal[1, 0, -1]] = Field(min_length=ATTRIBUTES, max_length=ATTRIBUTES)


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The pairs of all annotation files, by file name and then as listed.

    Args:
        root: folder with `gene_attrs/` and `gene_crop/`.
        variant: there is one.

    Raises:
        UserError: an annotation is missing or malformed, names a file outside the tree or a missing one, or two
            pairs have one `image_id`.
    """
    remedy = "--root is the MALS folder that holds gene_attrs/ and gene_crop/; get a damaged file again"
    files = sorted((root / "gene_attrs").glob("g_*_attrs.json"))
    if not files:
        raise UserError(f"{root / 'gene_attrs'}: holds no g_*_attrs.json; {remedy}")
    seen: set[str] = set()
    for file in files:
        for origin, entry in entries(file, _Entry, remedy):
            if entry.image_id in seen:
                raise UserError(f"{origin}: image_id {entry.image_id[:100]!r} occurs twice; remove one of the entries")
            seen.add(entry.image_id)
            yield RawSample(
                image=image_file(inside(root, entry.image, origin), origin),
                pid=None,
                camid=-1,
                split="train",
                role="train",
                captions=sentences([entry.caption]),
                source=entry.image,
            )


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split
