"""Flickr30k in Karpathy's split: `dataset_flickr30k.json` and a folder of images.

Published (train / val / test): 29,000 / 1,014 / 1,000 images with five sentences each. Images have no identity.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.forms.karpathy import karpathy_entries, karpathy_sample
from shards.raw import Counts, RawSample, image_file, inside

CARD: dict[str, Any] = {
    "title": "Flickr30k (Karpathy split)",
    "licence": "images: Flickr terms, research and education only; annotation on request from the authors",
    "consent": "photographs from Flickr; consent of depicted people is not known",
    "source": "https://shannon.cs.illinois.edu/DenotationGraph/",
    "citation": "Young et al., From Image Descriptions to Visual Denotations, TACL 2014; split: Karpathy and Fei-Fei, "
    "Deep Visual-Semantic Alignments for Generating Image Descriptions, CVPR 2015",
}

EXPECTED = {
    "standard": {
        "train": Counts(images=29_000, captions=145_000),
        "val": Counts(images=1_014, captions=5_070),
        "test": Counts(images=1_000, captions=5_000),
    }
}

ANNOTATION = "dataset_flickr30k.json"
FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation.

    Val and test images have the role "gallery"; each of their captions is a query of text-to-image retrieval.

    Args:
        root: folder with `dataset_flickr30k.json` and `flickr30k-images/` (or `flickr30k_images/`, `images/`).
        variant: there is one.

    Raises:
        UserError: the annotation or the folder is missing, the annotation is malformed, or names a file outside the
            folder or a missing one.
    """
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: holds none of the folders {', '.join(FOLDERS)}; --root is the Flickr30k folder")
    remedy = f"--root is the folder that holds {ANNOTATION}; get a damaged file again"
    for origin, entry in karpathy_entries(root / ANNOTATION, remedy):
        yield karpathy_sample(entry, image_file(inside(folder, entry.filename, origin), origin), root)


def part(sample: RawSample) -> str:
    """Counts are published per split."""
    return sample.split
