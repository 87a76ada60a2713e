"""UFine6926: people with two long sentences for each image, 80.8 words on average.

Published: 6,926 identities, 26,206 images, 52,412 captions, 4,926 of the identities to train and 2,000 to test. How
the images are split is recalled, not verified; the two numbers add up to the published total. CLIP's tokenizer cuts
many of these captions: `python -m shards.verify` reports the share.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.forms.annotation import entries
from shards.forms.person_text import Entry, samples_of
from shards.raw import Counts, RawSample

CARD: dict[str, Any] = {
    "title": "UFine6926",
    "licence": "signed agreement by mail, academic research only; no redistribution",
    "consent": "people in videos from the web; consent is not documented",
    "source": "https://github.com/Zplusdragon/UFineBench",
    "citation": "Zuo et al., UFineBench: Towards Text-based Person Retrieval with Ultra-fine Granularity, CVPR 2024, "
    "arXiv:2312.03441",
}

EXPECTED = {"standard": {"train": Counts(4_926, 18_577, 37_154), "test": Counts(2_000, 7_629, 15_258)}}

_NOT_ANNOTATIONS = frozenset({"world.json"})


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation; cameras are not known.

    Args:
        root: folder with one JSON file, whose name is not documented, and `images/`.
        variant: there is one.

    Raises:
        UserError: there is no JSON file or more than one, it is malformed, or it names a file outside the tree or a
            missing one.
    """
    found = sorted(path for path in root.glob("*.json") if path.name not in _NOT_ANNOTATIONS)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{root}: needs exactly one .json beside images/, found: {names}; --root is the UFine6926 folder"
        )
    return samples_of(found[0], entries(found[0], Entry, "get the file again"), "")


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split
