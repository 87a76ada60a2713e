"""The manifest of a checkpoint: what it says of itself, and where in its files each row is."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from reid_dist.errors import UserError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
NOTE = "Training state; where there is a queue: features and identities of people in training images, personal data."
_STEP = re.compile(r"step-(\d{8,})")
_Count = Annotated[int, Field(ge=0)]
# Rank, first row, distance of two rows, rows.
PieceRecord = tuple[_Count, _Count, Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, below the folder of a stage's checkpoints."""
    return folder / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name tells; None for another name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def rank_file(rank: int, world_size: int) -> str:
    """Name of a rank's tensors; its values are beside, as .json."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def tensor_key(part: str, name: str, first: int) -> str:
    """Name of a piece in its file; pieces of a tensor never begin with the same row."""
    return f"{part}/{name}@{first}"


def private_key(name: str) -> str:
    """Name of a rank's own tensor in its file."""
    return f"private/{name}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Section):
    """A file of the folder."""

    size: int
    sha256: str


class GroupRecord(_Section):
    """A parameter group, as it stood."""

    names: list[str]
    lr: float
    base_lr: float
    weight_decay: float


class TensorRecord(_Section):
    """A whole tensor, and the pieces that it is in."""

    dtype: str
    total: int
    row: list[int]  # shape of one row
    shape: list[int]
    pieces: list[PieceRecord]


class Record(_Section):
    """What the training tells of itself at a save."""

    stage: str
    kind: str
    steps: int  # of the whole stage
    fingerprint: str
    samples: int  # seen by all ranks together
    trainable: list[str]
    frozen: list[str]
    groups: list[GroupRecord]
    loss: float | None = None  # that the best checkpoint is told by; the lower the better
    model: dict[str, Any]  # settings of the encoder, for an export
    words: list[str] | None = None  # of its tokenizer; None for the architecture's own

    @field_validator("loss")
    @classmethod
    def _finite(cls, loss: float | None) -> float | None:
        return loss if loss is not None and math.isfinite(loss) else None


class Manifest(Record):
    """What a checkpoint says of itself."""

    format_version: int
    note: str
    step: int
    world_size: int
    versions: dict[str, str | None]
    commit: str | None
    digests: dict[str, str]  # by part, over all ranks; see `digests`
    private: list[str]  # hash of what each rank has of its own
    files: dict[Annotated[str, Field(pattern=r"^rank-\d{5}-of-\d{5}\.(safetensors|json)$")], FileRecord]
    tensors: dict[str, dict[str, TensorRecord]]  # by part and name

    def check_whole(self) -> None:
        """Looks whether every row of every tensor is in exactly one piece.

        Raises:
            ValueError: with the first tensor that is not whole.
        """
        for part, table in self.tensors.items():
            for name, record in table.items():
                _check_tiled(f"{part} {name}", record)


def _check_tiled(what: str, record: TensorRecord) -> None:
    if sum(count for _, _, _, count in record.pieces) != record.total:
        raise ValueError(f"{what}: its pieces do not hold {record.total} rows, as many as the tensor has")
    if any(first + (count - 1) * every >= record.total for _, first, every, count in record.pieces):
        raise ValueError(f"{what}: a piece ends behind the tensor's {record.total} rows")
    # As many rows as there are, all of them inside: none is missing if none is there twice.
    if all(every == 1 for _, _, every, _ in record.pieces):
        end = 0
        for first, count in sorted((first, count) for _, first, _, count in record.pieces):
            if first < end:
                raise ValueError(f"{what}: two pieces hold row {first}")
            end = first + count
    else:
        seen = torch.zeros(record.total, dtype=torch.bool)
        for _, first, every, count in record.pieces:
            seen[first : first + (count - 1) * every + 1 : every] = True
        if not seen.all():
            raise ValueError(f"{what}: no piece holds row {int(seen.logical_not().nonzero()[0])}")


def dump(manifest: Manifest) -> bytes:
    """The manifest's file: JSON with its own hash."""
    content = manifest.model_dump(mode="json")
    return (json.dumps({**content, "sha256": _json_sha256(content)}) + "\n").encode()


def parse(path: Path, data: bytes, remedy: str) -> Manifest:
    """Reads a manifest's file.

    Args:
        path: of the file, for errors.
        data: its content.
        remedy: what to do about a damaged one.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version}; this program reads {FORMAT_VERSION}")
    if content.pop("sha256", None) != _json_sha256(content):
        raise UserError(f"{path}: damaged, its content does not match its own hash; {remedy}")
    try:
        manifest = Manifest.model_validate(content)
        manifest.check_whole()
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{path}: {key}: {error.errors()[0]['msg']}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; {remedy}") from error
    return manifest


def _json_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
