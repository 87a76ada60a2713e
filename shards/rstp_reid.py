"""RSTPReid: MSMT17 people under new names, five images each and two sentences for each image.

Published (train / val / test): 3,701 / 200 / 200 identities, 18,505 / 1,000 / 1,000 images, twice as many captions,
15 cameras. The first release had another, wrong split (3,901 / 100 / 100), which is refused. The annotation gives some
captions to several identities, which keeps text-to-image rank-1 below 100 %: they are counted and reported.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from reid_dist.errors import UserError
from shards.forms.annotation import Text, entries
from shards.forms.person_text import Entry, samples_of
from shards.raw import Counts, RawSample

CARD: dict[str, Any] = {
    "title": "RSTPReid",
    "licence": "on request from the authors, academic research only; the images fall under the agreement of MSMT17",
    "consent": "people in images of MSMT17; consent is not documented",
    "source": "https://github.com/NjtechCVLab/RSTPReid-Dataset",
    "citation": "Zhu et al., DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval, "
    "ACM MM 2021, arXiv:2109.05534",
    "contains": ["msmt17"],
}

EXPECTED = {
    "standard": {
        "train": Counts(3_701, 18_505, 37_010, cameras=15),
        "val": Counts(200, 1_000, 2_000),
        "test": Counts(200, 1_000, 2_000),
    }
}

ANNOTATION = "data_captions.json"
_FIRST_RELEASE = {"train": 3_901, "val": 100, "test": 100}
_NAME = re.compile(r"\d+_c(\d{1,2})_\d+\.")


class _Entry(Entry):
    file_path: Text = Field(alias="img_path")  # its name in this set only


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation; prints how many captions several identities share.

    Args:
        root: folder with `data_captions.json` and `imgs/`.
        variant: there is one.

    Raises:
        UserError: the annotation is missing, malformed or that of the first release, names a file outside the tree
            or a missing one, or a name tells no camera.
    """
    path = root / ANNOTATION
    remedy = f"--root is the RSTPReid folder that holds {ANNOTATION} and imgs/; get a damaged file again"
    listed = list(entries(path, _Entry, remedy))
    identities = {split: len({entry.id for _, entry in listed if entry.split == split}) for split in _FIRST_RELEASE}
    if identities == _FIRST_RELEASE:
        raise UserError(
            f"{path}: has the wrong split of the first release (3,901/100/100 identities); get the corrected file "
            f"(3,701/200/200) from {CARD['source']}"
        )
    shared = shared_captions(entry for _, entry in listed)
    print(
        f"{path}: {shared} captions are written to several identities" + "; text cannot tell these apart" * (shared > 0)
    )
    return samples_of(path, listed, "imgs", lambda name: _camera(name, path))


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split


def shared_captions(listed: Iterable[Entry]) -> int:
    """How many different captions stand at more than one identity, whatever their case and spaces."""
    owners: dict[str, set[int]] = {}
    for entry in listed:
        for caption in entry.captions:
            owners.setdefault(" ".join(caption.casefold().split()), set()).add(entry.id)
    return sum(len(identities) > 1 for text, identities in owners.items() if text)


def _camera(name: str, path: Path) -> int:
    match = _NAME.match(name)
    if match is None or int(match[1]) < 1:
        raise UserError(f"{path}: {name!r} is not an RSTPReid name such as 0001_c14_0033.jpg; correct the entry")
    return int(match[1]) - 1
