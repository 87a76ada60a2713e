"""CUHK-PEDES: people with sentences, from `reid_raw.json` or from `caption_all.json`.

Published (train / val / test): 11,003 / 1,000 / 1,000 identities, 34,054 / 3,078 / 3,074 images,
68,126 / 6,158 / 6,156 captions. Identities count from 1, a few images have more than two captions, a few identities
a single image.

`caption_all.json` is the same list without splits. There is no way to tell its test identities, so the variant
"caption_all" puts every image into train: a model that has seen it must not be scored on CUHK-PEDES.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from shards.forms.annotation import entries
from shards.forms.person_text import Entry, samples_of
from shards.raw import Counts, RawSample

CARD: dict[str, Any] = {
    "title": "CUHK-PEDES",
    "licence": "on request from the authors, academic research only; no redistribution",
    "consent": "people in images of CUHK03, Market-1501, CUHK-SYSU, VIPeR, CUHK01; consent is not documented",
    "source": "https://github.com/ShuangLI59/Person-Search-with-Natural-Language-Description",
    "citation": "Li et al., Person Search with Natural Language Description, CVPR 2017, arXiv:1702.05729",
    "contains": ["market1501", "cuhk03_np"],
}

EXPECTED = {
    "standard": {
        "train": Counts(11_003, 34_054, 68_126),
        "val": Counts(1_000, 3_078, 6_158),
        "test": Counts(1_000, 3_074, 6_156),
    },
    "caption_all": {"train": Counts(13_003, 40_206, 80_440)},
}

ANNOTATIONS = {"standard": "reid_raw.json", "caption_all": "caption_all.json"}


class _Unsplit(Entry):
    split: Literal["train"] = "train"


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation; cameras are not annotated.

    Args:
        root: folder with the annotation and `imgs/`.
        variant: "standard" reads `reid_raw.json`, "caption_all" the other file.

    Raises:
        UserError: the annotation is missing or malformed, or names a file outside the tree or a missing one.
    """
    path = root / ANNOTATIONS[variant]
    remedy = f"--root is the CUHK-PEDES folder that holds {path.name} and imgs/; get a damaged file again"
    form = Entry if variant == "standard" else _Unsplit
    return samples_of(path, entries(path, form, remedy), "imgs")


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split
