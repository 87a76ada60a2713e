"""Folders that the ranks write together: safetensors, one file for each shard, and a JSON manifest with their hashes.

A folder appears under its name when it is whole: written beside it, flushed to the disk, then renamed. What goes wrong
on one rank is refused with the same words on all of them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from reid_dist.distributed import all_gather_object, rank, world_size
from reid_dist.errors import UserError
from reid_dist.files import aside, content_sha256, flush, replace_folder


class ShardRecord(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^[\w-]+\.safetensors$")  # of this folder
    sha256: str
    rows: int


class FolderRecord(BaseModel):
    """What every manifest says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int
    note: str
    shards: list[ShardRecord]


_T = TypeVar("_T")
_Record = TypeVar("_Record", bound=FolderRecord)


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        what: it holds, in errors.
        manifest: name of its manifest.
        without: what a run does that finds none.
        version: of the format.
    """

    what: str
    manifest: str
    without: str
    version: int = 1

    def remedy(self, folder: Path) -> str:
        """What to do with a folder that cannot be read."""
        return f"remove {folder} to {self.without}"


def save_shards(
    kind: Kind,
    folder: Path,
    shard: tuple[int, int],
    rows: dict[str, Tensor],
    note: str,
    describe: Callable[[list[ShardRecord]], FolderRecord],
) -> None:
    """Writes all ranks' shards and a manifest; every rank calls it.

    Args:
        kind: of the folder.
        folder: visible to all ranks; replaced when it exists.
        shard: number of this rank's, and how many there are; ranks beyond that write nothing.
        rows: of the shard, by name, of equal length.
        note: about what they are; into each file.
        describe: makes the manifest.

    Raises:
        UserError: on every rank when one of them cannot write.
    """
    partial = folder.with_name(folder.name + ".partial")
    together(kind, lambda: _make_empty(partial) if rank() == 0 else None)
    found = together(kind, lambda: _write_shard(partial, shard, rows, note) if rank() < shard[1] else None)
    record = describe([written for written in found if written is not None])
    together(kind, lambda: _finish(kind, record, partial, folder) if rank() == 0 else None)


def open_shards(
    kind: Kind, folder: Path, model: type[_Record], check: Callable[[Path, _Record], None]
) -> tuple[Path, _Record]:
    """Reads the manifest and verifies all files, which the ranks share out; every rank calls it.

    Args:
        kind: of the folder.
        folder: that was saved.
        model: of its manifest.
        check: refuses a manifest (its path, its content) that does not fit the reader.

    Returns:
        Where the files are, and the manifest.

    Raises:
        UserError: on every rank.
    """
    folder = together(kind, lambda: _present(kind, folder))[0]

    def read() -> _Record:
        record = _read_manifest(kind, folder, model)
        check(folder / kind.manifest, record)
        return record

    record = together(kind, read)[0]
    together(kind, lambda: _verify(kind, folder, record.shards[rank() :: world_size()]))
    return folder, record


def together(kind: Kind, action: Callable[[], _T]) -> list[_T]:
    """Runs an action on every rank and returns all values; what fails on one rank fails with its words on all."""
    value, problem = None, None
    try:
        value = action()
    except (OSError, SafetensorError) as error:
        problem = f"{kind.what}: {error}"
    except UserError as error:
        problem = str(error)
    values, problems = zip(*all_gather_object((value, problem)), strict=True)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise UserError(first)
    return list(values)


def _write_shard(folder: Path, shard: tuple[int, int], rows: dict[str, Tensor], note: str) -> ShardRecord:
    path = folder / f"shard-{shard[0]:05d}-of-{shard[1]:05d}.safetensors"
    save_file({name: x.cpu().contiguous() for name, x in rows.items()}, path, {"content": note})
    flush(path)
    return ShardRecord(file=path.name, sha256=content_sha256(path), rows=len(next(iter(rows.values()))))


def _finish(kind: Kind, record: FolderRecord, partial: Path, folder: Path) -> None:
    """Writes the manifest and gives the folder its name."""
    for shard in record.shards:
        if not (partial / shard.file).is_file():
            raise UserError(f"{partial}: rank 0 does not see {shard.file}; the folder must be visible to all ranks")
    content = record.model_dump(mode="json")
    (partial / kind.manifest).write_text(json.dumps({**content, "sha256": _json_sha256(content)}, indent=1) + "\n")
    flush(partial / kind.manifest)
    replace_folder(partial, folder)


def _present(kind: Kind, folder: Path) -> Path:
    """The folder, or what a save that was killed between its two renames left aside."""
    return aside(folder) if not folder.exists() and (aside(folder) / kind.manifest).is_file() else folder


def _read_manifest(kind: Kind, folder: Path, model: type[_Record]) -> _Record:
    path, remedy = folder / kind.manifest, kind.remedy(folder)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no saved {path.stem}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != kind.version:
        raise UserError(f"{path}: format_version is {version}; this program reads {kind.version}")
    if content.pop("sha256", None) != _json_sha256(content):
        raise UserError(f"{path}: damaged, its content does not match its own hash; {remedy}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{path}: {key}: {error.errors()[0]['msg']}; {remedy}") from error


def _verify(kind: Kind, folder: Path, shards: Sequence[ShardRecord]) -> None:
    remedy = kind.remedy(folder)
    for path, sha256 in ((folder / shard.file, shard.sha256) for shard in shards):
        if not path.is_file():
            raise UserError(f"{path}: missing; restore it, or {remedy}")
        if content_sha256(path) != sha256:
            raise UserError(f"{path}: damaged, its content does not match its hash; restore it, or {remedy}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _json_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
