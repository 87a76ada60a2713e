"""Market-1501: people in six cameras, identity and camera from the file names.

Published: 751 identities, 12,936 training images; 750 identities, 3,368 queries, 15,913 gallery images (distractors
included) beside 3,819 junk images. The variant "distractors_500k" adds the images of the folder `images/`, published
as "500k", to the gallery.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError
from shards.forms.tree import images_in
from shards.raw import Counts, RawSample, image_file

CARD: dict[str, Any] = {
    "title": "Market-1501",
    "licence": "academic research only; do not distribute",
    "consent": "filmed in front of a supermarket on a campus; consent is not documented",
    "source": "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html",
    "citation": "Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015",
}

_STANDARD = {
    "train": Counts(751, 12_936, cameras=6),
    "query": Counts(750, 3_368, cameras=6),
    "gallery": Counts(750, 15_913, cameras=6),
    "junk": Counts(images=3_819),
}
# "500k" is a round number: it is printed beside what is there, nothing is compared.
EXPECTED = {"standard": _STANDARD, "distractors_500k": {**_STANDARD, "distractors_500k": Counts()}}

MORE_DISTRACTORS = "images"
_FOLDERS: tuple[tuple[str, Split, Role], ...] = (
    ("bounding_box_train", "train", "train"),
    ("query", "test", "query"),
    ("bounding_box_test", "test", "gallery"),
)
# On the base name only: a folder such as run-2_c1 must not be read as an identity.
_NAME = re.compile(r"(-1|\d{4})_c([1-9])s\d+_\d+_\d+")
_CAMERA = re.compile(r"[^_]+_c([1-9])s\d")
# Market's folders with these names are DukeMTMC-reID or made from it; they are refused by name, so under another too.
_DUKE = re.compile(r"\d{4}_c\d_f\d+")
_JUNK, _DISTRACTOR = "-1", "0000"


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images of the three folders, by name; then those of `images/` where the variant asks for them.

    Identity -1 is junk (left out of every ranking) and 0000 is a distractor (stays in the gallery, is no query).

    Args:
        root: folder with `bounding_box_train`, `query` and `bounding_box_test`.
        variant: "standard" or "distractors_500k".

    Raises:
        UserError: a folder is missing or empty, or an image has another name.
    """
    remedy = "--root is the Market-1501 folder that holds it"
    for folder, split, role in _FOLDERS:
        for image in images_in(root / folder, remedy):
            yield _sample(image, f"{folder}/{image.name}", split, role)
    if variant == "distractors_500k":
        for image in images_in(
            root / MORE_DISTRACTORS, "unpack distractors_500k.zip there or use the variant standard"
        ):
            yield _distractor(image)


def part(sample: RawSample) -> str:
    """Counts are published per folder, with the junk of the gallery's folder apart."""
    if sample.source.startswith(f"{MORE_DISTRACTORS}/"):
        return "distractors_500k"
    return "gallery" if sample.role == "distractor" else sample.role


def _sample(image: Path, source: str, split: Split, role: Role) -> RawSample:
    match = _NAME.match(image.name)
    if _DUKE.match(image.name):
        raise UserError(f"{image}: a name of DukeMTMC-reID, which was withdrawn over consent and is not supported")
    if match is None:
        raise UserError(f"{image}: not a Market-1501 name such as 0002_c1s1_000451_03.jpg; remove or rename it")
    pid, camera = match.groups()
    special: dict[str, Role] = {_JUNK: "junk", _DISTRACTOR: "distractor"}
    if pid in special and role != "gallery":
        raise UserError(f"{image}: identity {pid} belongs into bounding_box_test only; remove the file")
    return RawSample(
        image=image_file(image),
        pid=pid,
        camid=int(camera) - 1,
        split=split,
        role=special.get(pid, role),
        captions=(),
        source=source,
    )


def _distractor(image: Path) -> RawSample:
    """A file of `images/`: whatever its name, it shows nobody who is asked for."""
    match = _CAMERA.match(image.name)
    return RawSample(
        image=image_file(image),
        pid=_DISTRACTOR,
        camid=int(match[1]) - 1 if match else -1,
        split="test",
        role="distractor",
        captions=(),
        source=f"{MORE_DISTRACTORS}/{image.name}",
    )
