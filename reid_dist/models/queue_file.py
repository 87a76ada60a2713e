"""A feature queue on disk: a folder of safetensors, one file for each shard, and a JSON manifest.

The rows carry their sequence numbers, so nothing depends on how the ranks were laid out: any world size reads the
files, replicated or sharded, into a queue of any size. What they hold is PERSONAL DATA (features of photographs of
people and their identities); exports of a model never include it.

Shape suffixes: S rows of one file, D feature size.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reid_dist.distributed import all_gather_object, rank, world_size
from reid_dist.errors import UserError
from reid_dist.files import aside, content_sha256, flush, replace_folder
from reid_dist.kernels.contrastive import EMPTY
from reid_dist.models.queue_ring import Ring

MANIFEST_FILE = "queue.json"
FORMAT_VERSION = 1
_BLOCK = 1 << 16
_NOTE = "Features and identities of people in training images: personal data."

_T = TypeVar("_T")


class ShardRecord(BaseModel):
    """One file of a saved queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^[\w-]+\.safetensors$")  # of this folder
    sha256: str
    rows: int


class QueueRecord(BaseModel):
    """The manifest: what a saved queue says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int
    note: str
    step: int
    size: int
    features: int
    dtype: str
    next_sequence: int
    shards: list[ShardRecord]


def save_ring(ring: Ring, folder: Path, step: int) -> None:
    """Writes the ring beside `folder`, flushes it to the disk and renames it; every rank calls it.

    Args:
        ring: of this rank; of a replicated queue rank 0 writes, of a sharded one every rank its part.
        folder: replaced when it exists.
        step: for the record.

    Raises:
        UserError: on every rank when one of them cannot write.
    """
    partial = folder.with_name(folder.name + ".partial")
    _together(lambda: _make_empty(partial) if rank() == 0 else None)
    shards = _together(lambda: _write_shard(ring, partial) if rank() < ring.shards else None)
    record = QueueRecord(
        format_version=FORMAT_VERSION,
        note=_NOTE,
        step=step,
        size=ring.size,
        features=ring.features,
        dtype=str(ring.dtype).removeprefix("torch."),
        next_sequence=int(ring.next),
        shards=[shard for shard in shards if shard is not None],
    )
    _together(lambda: _finish(record, partial, folder) if rank() == 0 else None)


def load_ring(ring: Ring, folder: Path) -> QueueRecord:
    """Replaces the content of the ring by the newest rows that were saved; every rank calls it.

    All files are verified before the first row is taken; the ranks share that work.

    Raises:
        UserError: on every rank, the ring unchanged.
    """
    folder = _together(lambda: _present(folder))[0]
    record = _together(lambda: _read_manifest(folder, ring.features))[0]
    _together(lambda: _verify(folder, record.shards[rank() :: world_size()]))
    ring.clear()
    ring.next.fill_(record.next_sequence)
    for shard in record.shards:
        _place(ring, folder / shard.file)
    return record


def _write_shard(ring: Ring, folder: Path) -> ShardRecord:
    path = folder / f"shard-{ring.shard:05d}-of-{ring.shards:05d}.safetensors"
    rows = {"image": ring.image_XD, "text": ring.text_XD, "ids": ring.ids_X, "sequence": ring.sequence_X}
    save_file({name: x[: ring.slots].cpu().contiguous() for name, x in rows.items()}, path, {"content": _NOTE})
    flush(path)
    return ShardRecord(file=path.name, sha256=content_sha256(path), rows=ring.slots)


def _finish(record: QueueRecord, partial: Path, folder: Path) -> None:
    """Writes the manifest and gives the folder its name."""
    for shard in record.shards:
        if not (partial / shard.file).is_file():
            raise UserError(f"{partial}: rank 0 does not see {shard.file}; the folder must be visible to all ranks")
    content = record.model_dump(mode="json")
    (partial / MANIFEST_FILE).write_text(json.dumps({**content, "sha256": _json_sha256(content)}, indent=1) + "\n")
    flush(partial / MANIFEST_FILE)
    replace_folder(partial, folder)


def _present(folder: Path) -> Path:
    """The folder, or what a save that was killed between its two renames left aside."""
    return aside(folder) if not folder.exists() and (aside(folder) / MANIFEST_FILE).is_file() else folder


def _read_manifest(folder: Path, features: int) -> QueueRecord:
    path, remedy = folder / MANIFEST_FILE, _remedy(folder)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no saved queue; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version}; this program reads {FORMAT_VERSION}")
    if content.pop("sha256", None) != _json_sha256(content):
        raise UserError(f"{path}: damaged, its content does not match its own hash; {remedy}")
    try:
        record = QueueRecord.model_validate(content)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{path}: {key}: {error.errors()[0]['msg']}; {remedy}") from error
    if record.features != features:
        raise UserError(
            f"{path}: keys of {record.features} features, but the model's have {features}; set model to the one that "
            f"was trained, or {remedy}"
        )
    return record


def _verify(folder: Path, shards: list[ShardRecord]) -> None:
    for path, sha256 in ((folder / shard.file, shard.sha256) for shard in shards):
        if not path.is_file():
            raise UserError(f"{path}: missing; restore it, or {_remedy(folder)}")
        if content_sha256(path) != sha256:
            raise UserError(f"{path}: damaged, its content does not match its hash; restore it, or {_remedy(folder)}")


def _place(ring: Ring, path: Path) -> None:
    """Writes the rows of one file that belong into this rank's shard of the ring."""
    with safe_open(path, framework="pt", device=str(ring.next.device)) as file:
        parts = [file.get_slice(name) for name in ("image", "text", "ids", "sequence")]
        for start in range(0, parts[0].get_shape()[0], _BLOCK):
            image_SD, text_SD, ids_S, sequence_S = (part[start : start + _BLOCK] for part in parts)
            ring.place(image_SD, text_SD, ids_S, sequence_S, ids_S != EMPTY)


def _together(action: Callable[[], _T]) -> list[_T]:
    """Runs an action on every rank and returns all values; what fails on one rank fails with its words on all."""
    value, problem = None, None
    try:
        value = action()
    except (OSError, SafetensorError) as error:
        problem = f"feature queue: {error}"
    except UserError as error:
        problem = str(error)
    values, problems = zip(*all_gather_object((value, problem)), strict=True)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise UserError(first)
    return list(values)


def _remedy(folder: Path) -> str:
    return f"remove {folder} to start with an empty queue"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _json_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
