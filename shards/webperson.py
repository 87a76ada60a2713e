"""WebPerson (GA-DMS): crops of people from web images with two machine-made captions each.

Two forms are read: the parquet files of the release (columns `image`, a struct with the bytes, or only `image_path`;
`caption1`, `caption2`), and `100w.json`, the list `{path: {caption1, caption2}}` that the authors' loader reads, with
the images as files. Published: 1,000,000 and 5,002,723 images with two captions each. All is training data, and every
image is its own identity.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from reid_dist.data.sample import MAX_IMAGE_BYTES
from reid_dist.errors import UserError
from shards.forms.annotation import Text, files_below, read_json, sentences, validated
from shards.raw import Counts, RawImage, RawSample, image_file, inside

CARD: dict[str, Any] = {
    "title": "WebPerson",
    "licence": "see the source; each image has its own",
    "consent": "people in images from the web (COYO-700M); consent of depicted people is not known",
    "source": "https://github.com/Multimodal-Representation-Learning-MRL/GA-DMS",
    "citation": "Zheng et al., Gradient-Attention Guided Dual-Masking Synergetic Framework for Robust Text-based "
    "Person Retrieval, EMNLP 2025, arXiv:2509.09118",
}

EXPECTED = {
    "1m": {"train": Counts(images=1_000_000, captions=2_000_000)},
    "5m": {"train": Counts(images=5_002_723, captions=10_005_446)},
}

ANNOTATION = "100w.json"
_BYTES = "image.bytes"
_TEXTS = ("image_path", "caption1", "caption2")
_FORM = "columns image (a struct with bytes) or image_path, caption1, caption2"
_REMEDY = "get the file again"


class _Row(BaseModel):
    """One row of a parquet file, without its image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_path: Text | None = None
    caption1: Text
    caption2: Text


class _Listed(BaseModel):
    """A path and what `100w.json` has of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: Text
    caption1: Text
    caption2: Text


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a parquet file.

    Attributes:
        path: the file.
        row_group: part of the file that is decoded as one.
        row: inside the row group.
        size: bytes, the mean of the row group.
    """

    path: Path
    row_group: int
    row: int
    size: int

    @property
    def name(self) -> str:
        """The file, the row group and the row."""
        return f"{self.path}: row group {self.row_group}, row {self.row}"

    @property
    def group(self) -> str:
        """The file and the row group: decoding it for one image decodes it for all."""
        return f"{self.path}:{self.row_group}"

    def read(self) -> bytes:
        """The image's bytes, up to one above the cap."""
        images = _decoded(self.path, self.row_group)
        data = images[self.row].as_py() if self.row < len(images) else None
        if data is None:
            raise UserError(f"{self.name}: holds no image; {_REMEDY}")
        return bytes(data[: MAX_IMAGE_BYTES + 1])


def samples(root: Path, variant: str) -> Iterator[RawSample]:
    """The images of all parquet files by name and row, or those that `100w.json` lists.

    Args:
        root: folder that holds parquet files at any depth, or `100w.json` and the images that it names.
        variant: which size is expected, `1m` or `5m`.

    Raises:
        UserError: neither or both forms are there, a file is damaged or of another form, an image is missing, or
            pyarrow is not installed.
    """
    files = files_below(root, ".parquet")
    listed = (root / ANNOTATION).is_file()
    if files and listed:
        raise UserError(f"{root}: holds parquet files and {ANNOTATION}; move one of the two forms elsewhere")
    if not files and not listed:
        raise UserError(f"{root}: holds neither parquet files nor {ANNOTATION}; --root is the WebPerson folder")
    if listed:
        yield from _listed(root)
    for file in files:
        yield from _rows(root, file)


def part(sample: RawSample) -> str:
    """One row for all."""
    return sample.split


def _listed(root: Path) -> Iterator[RawSample]:
    path = root / ANNOTATION
    content = read_json(path, _REMEDY)
    if not isinstance(content, list):
        raise UserError(f"{path}: not a JSON list; {_REMEDY}")
    for number, entry in enumerate(content):
        origin = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{origin}: not an object {{path: {{caption1, caption2}}}}; {_REMEDY}")
        for place, texts in entry.items():
            fields = {**texts, "path": place} if isinstance(texts, dict) else texts
            pair = validated(_Listed, fields, origin, _REMEDY)
            image = image_file(inside(root, pair.path, origin), origin)
            yield _sample(image, (pair.caption1, pair.caption2), pair.path)


def _rows(root: Path, path: Path) -> Iterator[RawSample]:
    with _damage_of(path):
        file = _arrow(path).parquet.ParquetFile(path)
        columns, groups = set(file.schema_arrow.names), file.num_row_groups
        leaves = {file.schema.column(number).path for number in range(len(file.schema))}
    stored = _BYTES in leaves
    if not columns >= {"caption1", "caption2"} or not (stored or "image_path" in columns):
        raise UserError(f"{path}: not WebPerson (needs {_FORM}; has {', '.join(sorted(leaves))}); remove the file")
    number = 0
    place = path.relative_to(root).with_suffix("").as_posix()
    for group in range(groups):
        with _damage_of(path):
            texts = file.read_row_group(group, columns=[name for name in _TEXTS if name in columns]).to_pylist()
            size = _mean_size(file, group) if stored else 0
        for row, values in enumerate(texts):
            origin = f"{path}: row {number}"
            entry = validated(_Row, values, origin, _REMEDY)
            image: RawImage
            if stored:
                image, source = ParquetImage(path, group, row, size), f"{place}/{number:08d}"
            elif entry.image_path:
                image, source = image_file(inside(root, entry.image_path, origin), origin), entry.image_path
            else:
                raise UserError(f"{origin}: neither an image nor its path; {_REMEDY}")
            yield _sample(image, (entry.caption1, entry.caption2), source)
            number += 1


def _sample(image: RawImage, captions: tuple[str, str], source: str) -> RawSample:
    return RawSample(
        image=image, pid=None, camid=-1, split="train", role="train", captions=sentences(captions), source=source
    )


def _arrow(path: Path) -> Any:
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'reid_dist[parquet]'") from None
    return pyarrow


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into one line; it decodes lazily, so anything may fail."""
    try:
        yield
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's own are of these kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as parquet ({reason}); {_REMEDY}") from None


def _mean_size(file: Any, group: int) -> int:
    """Bytes of the images of a row group divided by its rows."""
    facts = file.metadata.row_group(group)
    columns = (facts.column(number) for number in range(facts.num_columns))
    total = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == _BYTES)
    return int(total // max(facts.num_rows, 1))


@lru_cache(maxsize=2)
def _decoded(path: Path, group: int) -> Any:
    """The image bytes of one row group; kept, as its images are asked for one after the other."""
    arrow = _arrow(path)
    with _damage_of(path):
        table = arrow.parquet.ParquetFile(path).read_row_group(group, columns=[_BYTES])
        return arrow.compute.struct_field(table.column("image"), "bytes")
