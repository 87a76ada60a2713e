"""SYNTH-PEDES (PLIP): real people with machine-made sentences, from its `synthpedes_dataset.json`.

Published: 312,321 identities, 4,791,711 images, 12,138,157 sentences (two or three for each image). All is training
data. The variant `prompts` adds the sentence that the authors made from the attributes by a fixed pattern; it is not
part of the published count.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from shards.forms.annotation import Text, entries, sentences
from shards.raw import Counts, RawSample, image_file, inside

CARD: dict[str, Any] = {
    "title": "SYNTH-PEDES",
    "licence": "research only, no commercial use",
    "consent": "people in street videos from the web (LUPerson-NL) and in LPW; consent is not documented",
    "source": "https://github.com/Zplusdragon/PLIP",
    "citation": "Zuo et al., PLIP: Language-Image Pre-training for Person Representation Learning, NeurIPS 2024, "
    "arXiv:2305.08386",
    "contains": ["luperson"],
}

EXPECTED = {
    "standard": {"train": Counts(312_321, 4_791_711, 12_138_157)},
    "prompts": {"train": Counts(312_321, 4_791_711)},
}

ANNOTATION = "synthpedes_dataset.json"


class _Entry(BaseModel):
    """One element of the annotation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: int = Field(ge=0)
    file_path: Text
    attributes: list[str]
    captions: list[Text] = Field(min_length=1)
    prompt_caption: list[Text]


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images in the order of the annotation; cameras are not known.

    Args:
        root: folder with `synthpedes_dataset.json` and `Part1` to `Part11`.
        variant: `standard`, or `prompts` for the sentences made from attributes as well.

    Raises:
        UserError: the annotation is missing or malformed, or names a file outside the tree or a missing one.
    """
    remedy = f"--root is the SYNTH-PEDES folder that holds {ANNOTATION} and Part1 to Part11; get a damaged file again"
    for origin, entry in entries(root / ANNOTATION, _Entry, remedy):
        captions = [*entry.captions, *(entry.prompt_caption if variant == "prompts" else ())]
        yield RawSample(
            image=image_file(inside(root, entry.file_path, origin), origin),
            pid=str(entry.id),
            camid=-1,
            split="train",
            role="train",
            captions=sentences(captions),
            source=entry.file_path,
        )


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split
