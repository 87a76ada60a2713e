"""Market-1501: people in six cameras, identity and camera from the file names.

Published: 751 identities, 12,936 training images; 750 identities, 3,368 queries, 15,913 gallery images (distractors
included) beside 3,819 junk images.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError
from shards.raw import IMAGE_SUFFIXES, Counts, RawSample

CARD: dict[str, Any] = {
    "title": "Market-1501",
    "licence": "academic research only; do not distribute",
    "consent": "filmed in front of a supermarket on a campus; consent is not documented",
    "source": "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html",
    "citation": "Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015",
    "overlap": "CUHK-PEDES holds images of it: do not train on one and test on the other",
}

EXPECTED = {
    "train": Counts(751, 12_936),
    "query": Counts(750, 3_368),
    "gallery": Counts(750, 15_913),
    "junk": Counts(images=3_819),
}

_FOLDERS: tuple[tuple[str, Split, Role], ...] = (
    ("bounding_box_train", "train", "train"),
    ("query", "test", "query"),
    ("bounding_box_test", "test", "gallery"),
)
# On the base name only: a folder such as run-2_c1 must not be read as an identity.
_NAME = re.compile(r"(-1|\d{4})_c([1-9])s\d+_\d+_\d+")
_JUNK, _DISTRACTOR = "-1", "0000"


def samples(root: Path) -> Iterator[RawSample]:
    """The images of the three folders, by name.

    Identity -1 is junk (left out of every ranking) and 0000 is a distractor (stays in the gallery, is no query).

    Args:
        root: folder with `bounding_box_train`, `query` and `bounding_box_test`.

    Raises:
        UserError: a folder is missing or empty, or an image has another name.
    """
    for folder, split, role in _FOLDERS:
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder}: missing; --root is the Market-1501 folder that holds {folder}/")
        files = (path for path in (root / folder).iterdir() if path.is_file())
        images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise UserError(f"{root / folder}: holds no images; unpack the data set again")
        for image in images:
            yield _sample(image, f"{folder}/{image.name}", split, role)


def part(sample: RawSample) -> str:
    """Counts are published per folder, with the junk of the gallery's folder apart."""
    return "gallery" if sample.role == "distractor" else sample.role


def _sample(image: Path, source: str, split: Split, role: Role) -> RawSample:
    match = _NAME.match(image.name)
    if match is None:
        raise UserError(f"{image}: not a Market-1501 name such as 0002_c1s1_000451_03.jpg; remove or rename it")
    pid, camera = match.groups()
    special: dict[str, Role] = {_JUNK: "junk", _DISTRACTOR: "distractor"}
    if pid in special and role != "gallery":
        raise UserError(f"{image}: identity {pid} belongs into bounding_box_test only; remove the file")
    return RawSample(
        image=image,
        pid=pid,
        camid=int(camera) - 1,
        split=split,
        role=special.get(pid, role),
        captions=(),
        source=source,
    )
