"""WIT, the images of Wikipedia with their texts: tars as img2dataset writes them, the data set's own TSV, or both.

The TSV (`*.tsv` or `*.tsv.gz` in the root) holds links and no images. A row is used when its image is here: a file
anywhere below `images/` whose name before the suffix is the SHA-256 of the link, as by

    hashlib.sha256(image_url.encode()).hexdigest() + ".jpg"

The captions of a row are its reference description and its alt text; rows of the same link are one image with the
captions of all. The attribution is not used: it names authors and licences. What part of the 11.5 million images is
here differs for everyone, so there is nothing to compare the counts with.
"""

import csv
import gzip
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from reid_dist.errors import UserError
from shards.forms.annotation import bounded_lines, sentences
from shards.forms.tree import is_image
from shards.img2dataset import tar_samples, tars_below
from shards.raw import Counts, RawSample, image_file

CARD: dict[str, Any] = {
    "title": "WIT (Wikipedia-based Image Text)",
    "licence": "texts and annotations CC BY-SA 3.0; each image has its own",
    "consent": "images of Wikimedia; consent of depicted people is not known",
    "source": "https://github.com/google-research-datasets/wit",
    "citation": "Srinivasan et al., WIT: Wikipedia-based Image Text Dataset for Multimodal Multilingual Machine "
    "Learning, SIGIR 2021, arXiv:2103.01913",
}

EXPECTED: dict[str, dict[str, Counts]] = {"en": {}, "all": {}}

COLUMNS = ("language", "image_url", "caption_reference_description", "caption_alt_text_description")
"""What is read of the seventeen columns."""
IMAGES = "images"
_MAX_FIELD = 1_000_000
_MAX_LINE = 4_000_000


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The pairs of all tars by path, then those of the TSV in the order in which its rows first name an image.

    Args:
        root: folder with tars at any depth, or with `*.tsv` or `*.tsv.gz` files and `images/`.
        variant: `en`, the rows whose language is en (in tars: or whose `.json` names none); or `all`.

    Raises:
        UserError: neither form is there, a file is damaged or of another form, or no row of the TSV has an image
            here.
    """
    tars = tars_below(root)
    tables = sorted([*root.glob("[!.]*.tsv"), *root.glob("[!.]*.tsv.gz")])
    if not tars and not tables:
        raise UserError(f"{root}: holds neither tars nor *.tsv or *.tsv.gz; --root is the folder of WIT")
    for path in tars:
        for sample, facts in tar_samples(root, path):
            if variant == "all" or facts.language in (None, "en"):
                yield sample
    if tables:
        yield from _from_tables(root, tables, variant)


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split


def local_name(image_url: str) -> str:
    """The name, without suffix, that the file of a link has below `images/`."""
    return hashlib.sha256(image_url.encode()).hexdigest()


def _from_tables(root: Path, tables: list[Path], variant: str) -> Iterator[RawSample]:
    here = _local_images(root)
    captions: dict[str, dict[str, None]] = {}
    left_out: Counter[str] = Counter()
    for table in tables:
        for language, url, *texts in _rows(table):
            name = local_name(url)
            found = sentences(texts)
            if name not in here:
                left_out["without an image here"] += 1
            elif variant != "all" and language != variant:
                left_out["in other languages"] += 1
            elif not found:
                left_out["without a caption"] += 1
            else:
                captions.setdefault(name, {}).update(dict.fromkeys(found))
    if left_out:
        print(f"{root}: rows left out: {', '.join(f'{count} {why}' for why, count in left_out.items())}")
    if not captions:
        raise UserError(f"{root}: no row has its image below {IMAGES}/; name them by the SHA-256 of image_url")
    for name, texts_of in captions.items():
        path = here[name]
        yield RawSample(
            image=image_file(path),
            pid=None,
            camid=-1,
            split="train",
            role="train",
            captions=tuple(texts_of),
            source=path.relative_to(root).as_posix(),
        )


def _local_images(root: Path) -> dict[str, Path]:
    """The images below `images/` by their names without suffix."""
    here: dict[str, Path] = {}
    for path in sorted((root / IMAGES).rglob("*")):
        if is_image(path.name):
            name = path.stem.lower()
            if name in here:
                raise UserError(f"{path}: the same name as {here[name]}; remove one of them")
            here[name] = path
    return here


def _rows(path: Path) -> Iterator[list[str]]:
    """The fields COLUMNS of every row."""
    csv.field_size_limit(_MAX_FIELD)
    with _text(path) as file:
        reader = csv.reader(bounded_lines(file, str(path), _MAX_LINE), delimiter="\t")
        try:
            header = next(reader, [])
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise UserError(f"{path}: has no column {', '.join(missing)}; its first line names those of WIT")
            wanted = [header.index(name) for name in COLUMNS]
            for row in reader:
                if len(row) != len(header):
                    raise UserError(
                        f"{path}: line {reader.line_num}: {len(row)} columns instead of {len(header)}; "
                        f"get the file again"
                    )
                yield [row[column] for column in wanted]
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: {error}; get the file again") from None


def _text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
