"""The shard contract: what one sample, the row that finds it and the manifest of a shard set look like.

A shard set is a folder of tars with adjacent `<key>.jpg` and `<key>.json` entries, `index.npy` (one INDEX_DTYPE row
per sample, in tar order) and `manifest.json`. Tars of other software, which hold no record of ours, get theirs in
`records.jsonl` beside the index. Writers and readers meet in this file only.
"""

import hashlib
import re
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "val", "test"]
Role = Literal["train", "query", "gallery", "distractor", "junk"]

SPLITS: tuple[Split, ...] = get_args(Split)
ROLES: tuple[Role, ...] = get_args(Role)
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,100}")
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
RECORDS_NAME = "records.jsonl"
ATTRIBUTES_NAME = "attributes.json"
DATASET_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Caps that a hostile or broken file must not pass; writers and readers share them.
MAX_IMAGE_BYTES = 20_000_000
MAX_JSON_BYTES = 64 * 1024
MAX_PIXELS = 4_000_000
# Other readers of such tars run these (webdataset unpickles by default); a set of images and captions needs none.
EXECUTABLE = frozenset(
    {"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill", "py", "pyc", "so", "dll", "exe", "sh", "bat"}
)
# How files begin that are no plain tars.
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}

# Offsets are those of the content inside the tar, so that one pread returns the bytes. `split` and `role` are
# positions in SPLITS and ROLES; `pid` is a position in the manifest's identities. The digests are those of the
# contents, see `content_digest`: a flipped bit is found when a sample is read, and equal images without reading any.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<i4"),
        ("image_offset", "<i8"),
        ("image_size", "<i4"),
        ("json_offset", "<i8"),
        ("json_size", "<i4"),
        ("image_digest", "<u8"),
        ("json_digest", "<u8"),
        ("pid", "<i4"),
        ("camid", "<i4"),
        ("split", "i1"),
        ("role", "i1"),
        ("captions", "<i4"),
    ]
)


def content_digest(data: bytes) -> int:
    """What the index keeps of a content: the first 8 bytes of its sha256 as a little-endian number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


class Sample(BaseModel):
    """The JSON entry of one sample.

    Attributes:
        v: version of this record.
        dataset: name of the data set; the first part of `pid`.
        pid: identity, "dataset:raw id"; a pair without identity uses "dataset:<key>", so it is its own identity.
        camid: camera, counted from 0; -1 is unknown.
        split: train, val or test.
        role: train, or what the image is in retrieval.
        captions: sentences about the image, any number.
        source: path of the raw file inside the raw tree.
        width: pixels of the stored image.
        height: pixels of the stored image.
        sha256: hex digest of the stored image bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    dataset: str = Field(pattern=f"^{DATASET_PATTERN.pattern}$")
    pid: str = Field(max_length=200)
    camid: int = Field(ge=-1, lt=2**31)
    split: Split
    role: Role
    captions: list[str] = []
    source: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _namespaced(self) -> "Sample":
        if not self.pid.startswith(self.dataset + ":"):
            raise ValueError(f'pid "{self.pid}" does not start with "{self.dataset}:"')
        return self


class ShardFile(BaseModel):
    """One tar of a set.

    Attributes:
        name: of the file, inside the folder unless `location` says otherwise.
        sha256: hex digest of the tar.
        bytes: its size.
        samples: number of samples.
        location: where a tar of other software lies, an absolute path or an https, http or s3 URL; empty: inside the
            folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,150}\.tar$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    samples: int = Field(ge=0)
    location: str = ""


class SplitCounts(BaseModel):
    """What one split holds; `identities` leaves out distractors and junk, the others count every image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(ge=0)
    identities: int = Field(ge=0)
    captions: int = Field(ge=0)
    cameras: int = Field(ge=0)


class Manifest(BaseModel):
    """`manifest.json`: the shards with their hashes, the identities in index order, counts and a card.

    `index_sha256` ties `index.npy` to this manifest; empty (a set made by other software) leaves that unchecked. Where
    `records_sha256` is set, JSON offsets are those inside `records.jsonl` and not inside the tars.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    dataset: str = Field(pattern=f"^{DATASET_PATTERN.pattern}$")
    shards: list[ShardFile]
    identities: list[str]
    splits: dict[Split, SplitCounts]
    index_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    records_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    card: dict[str, Any] = {}

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


class Attributes(BaseModel):
    """`attributes.json`: what is known of people beyond their images; not every set has it, and no training reads it.

    Attributes:
        attributes: by identity, as samples name it, the value of each attribute by its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attributes: dict[str, dict[str, str]]
