"""CUHK03 under the new protocol (CUHK03-NP): people in two cameras, detected or hand-labelled boxes, PNG files.

Published (detected / labeled): 767 training identities, 7,365 / 7,368 images; 700 test identities, 1,400 queries,
5,332 / 5,328 gallery images. File names come in two forms, `0001_c1_21.png` and `1_001_1_01.png`: camera pair, person,
camera, image. In the second one the number of the person begins anew with each camera pair, so pair and person
together are the identity.

Only the folder form is read; the `.mat` form (`cuhk03_new_protocol_config_*.mat`) would need scipy.
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
    "title": "CUHK03-NP",
    "licence": "on request from the authors, academic research only; no redistribution",
    "consent": "filmed on a campus; consent is not documented",
    "source": "https://github.com/zhunzhong07/person-re-ranking/tree/master/CUHK03-NP",
    "citation": "Li et al., DeepReID, CVPR 2014; protocol: Zhong et al., Re-ranking Person Re-identification with "
    "k-reciprocal Encoding, CVPR 2017, arXiv:1701.08398",
}

EXPECTED = {
    "detected": {
        "train": Counts(767, 7_365, cameras=2),
        "query": Counts(700, 1_400, cameras=2),
        "gallery": Counts(700, 5_332, cameras=2),
    },
    "labeled": {
        "train": Counts(767, 7_368, cameras=2),
        "query": Counts(700, 1_400, cameras=2),
        "gallery": Counts(700, 5_328, cameras=2),
    },
}

_FOLDERS: tuple[tuple[str, Split, Role], ...] = (
    ("bounding_box_train", "train", "train"),
    ("query", "test", "query"),
    ("bounding_box_test", "test", "gallery"),
)
_FORMS = (re.compile(r"(\d{4})_c([1-9])_\d+\."), re.compile(r"(\d+_\d{3})_([1-9])_\d+\."))


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images of the three folders of a variant, by name.

    Args:
        root: folder with `detected/` or `labeled/`.
        variant: which of them.

    Raises:
        UserError: a folder is missing or empty, or an image has another name.
    """
    mat = root / f"cuhk03_new_protocol_config_{variant}.mat"
    remedy = (
        f"--root is the cuhk03-np folder that holds {variant}/ with bounding_box_train, bounding_box_test and query"
    )
    if mat.is_file() and not (root / variant).is_dir():
        remedy = f"{mat.name} is not read, get the folder form of the data set"
    for folder, split, role in _FOLDERS:
        for image in images_in(root / variant / folder, remedy):
            pid, camera = _identity_and_camera(image)
            yield RawSample(
                image=image_file(image),
                pid=pid,
                camid=camera - 1,
                split=split,
                role=role,
                captions=(),
                source=f"{variant}/{folder}/{image.name}",
            )


def part(sample: RawSample) -> str:
    """Counts are published per folder."""
    return sample.role


def _identity_and_camera(image: Path) -> tuple[str, int]:
    match = next(filter(None, (form.match(image.name) for form in _FORMS)), None)
    if match is None:
        raise UserError(f"{image}: not a CUHK03-NP name such as 0001_c1_21.png or 1_001_1_01.png; remove or rename it")
    return match[1], int(match[2])
