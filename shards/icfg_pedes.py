"""ICFG-PEDES: MSMT17 people with one sentence for each image.

Published (train / test, there is no val): 3,102 / 1,000 identities, 34,674 / 19,848 images with one caption each.
The folders `imgs/train` and `imgs/test` are those of MSMT17 and not the split, which is a field of the annotation.
File names are those of MSMT17 and tell the camera.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.forms.annotation import entries
from shards.forms.person_text import Entry, samples_of
from shards.msmt17 import camera_of
from shards.raw import Counts, RawSample

CARD: dict[str, Any] = {
    "title": "ICFG-PEDES",
    "licence": "on request from the authors, academic research only; the images fall under the agreement of MSMT17",
    "consent": "people in images of MSMT17; consent is not documented",
    "source": "https://github.com/zifyloo/SSAN",
    "citation": "Ding et al., Semantically Self-Aligned Network for Text-to-Image Part-aware Person "
    "Re-identification, 2021, arXiv:2107.12666",
    "contains": ["msmt17"],
}

EXPECTED = {"standard": {"train": Counts(3_102, 34_674, 34_674), "test": Counts(1_000, 19_848, 19_848)}}

ANNOTATIONS = ("ICFG-PEDES.json", "ICFG_PEDES.json")
"""Two spellings are in use."""


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation.

    Args:
        root: folder with `ICFG-PEDES.json` or `ICFG_PEDES.json` and `imgs/`.
        variant: there is one.

    Raises:
        UserError: the annotation is missing, there twice or malformed, or names a file outside the tree or a missing
            one.
    """
    present = [name for name in ANNOTATIONS if (root / name).is_file()]
    if len(present) > 1:
        raise UserError(f"{root}: holds {' and '.join(present)}; keep the one that is meant")
    path = root / (present or ANNOTATIONS)[0]
    remedy = (
        f"--root is the ICFG-PEDES folder that holds {' or '.join(ANNOTATIONS)} and imgs/; get a damaged file again"
    )
    return samples_of(path, entries(path, Entry, remedy), "imgs", lambda name: camera_of(name, default=-1))


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split
