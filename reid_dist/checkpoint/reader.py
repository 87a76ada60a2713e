"""Reading a checkpoint: every file is verified before the first is opened, and nothing is unpickled.

Shape suffixes: N rows of a piece.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reid_dist.checkpoint.agreement import together
from reid_dist.checkpoint.digests import as_hex, digests
from reid_dist.checkpoint.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    TensorRecord,
    parse,
    private_key,
    rank_file,
    step_of,
    tensor_key,
)
from reid_dist.checkpoint.private import Private
from reid_dist.checkpoint.tensor_file import DTYPES
from reid_dist.distributed import rank, world_size
from reid_dist.errors import UserError
from reid_dist.files import content_sha256
from reid_dist.pieces import Piece

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


class Checkpoint:
    """A verified checkpoint; see `open_checkpoint`. It is a `Saved`.

    Attributes:
        folder: its own.
        manifest: what it says of itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._files: dict[int, Any] = {}  # safetensors has no types

    def names(self, part: str) -> list[str]:
        """See `Saved`."""
        return sorted(self.manifest.tensors.get(part, {}))

    def total(self, part: str, name: str) -> int:
        """See `Saved`."""
        return self._record(part, name).total

    def rows(self, part: str, name: str, first: int, count: int, every: int = 1) -> Tensor:
        """See `Saved`."""
        record = self._record(part, name)
        last = first + (count - 1) * every
        if count and last >= record.total:
            raise UserError(f"{self.folder}: {part} {name} has {record.total} rows, there is no row {last}")
        rows_N = torch.empty((count, *record.row), dtype=_TORCH[record.dtype])
        for owner, its_first, its_every, its_count in record.pieces:
            here, there = _common((first, count, every), (its_first, its_count, its_every))
            if len(here):
                piece = self._file(owner).get_slice(tensor_key(part, name, its_first))
                rows_N[here.start : here.stop : here.step] = piece[there.start : there.stop][:: there.step]
        return rows_N

    def whole(self, part: str, name: str) -> Tensor:
        """A tensor in its own shape, on the CPU."""
        record = self._record(part, name)
        return self.rows(part, name, 0, record.total).reshape(record.shape)

    def private(self, rank: int) -> Private | None:
        """What a rank had of its own; None where fewer ranks have saved."""
        if rank >= self.manifest.world_size:
            return None
        file, prefix = self._file(rank), private_key("")
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (it is no dict)
        return Private({key.removeprefix(prefix): file.get_tensor(key) for key in keys}, self.values(rank))

    def values(self, rank: int) -> dict[str, Any]:
        """The values of `private`; of a rank that has saved."""
        name = rank_file(rank, self.manifest.world_size).replace(".safetensors", ".json")
        values: dict[str, Any] = json.loads((self.folder / name).read_bytes())
        return values

    def close(self) -> None:
        """Lets go of the files, which take their room on the disk until then, removed or not."""
        self._files.clear()

    def digests(self) -> dict[str, str]:
        """The digest of each part as its files give it, to compare with the manifest's."""
        found = digests(
            Piece(part, name, self.whole(part, name).reshape(record.total, *record.row), record.total)
            for part, table in self.manifest.tensors.items()
            for name, record in table.items()
        )
        return {part: as_hex(value) for part, value in found.items()}

    def _record(self, part: str, name: str) -> TensorRecord:
        record = self.manifest.tensors.get(part, {}).get(name)
        if record is None:
            raise UserError(f"{self.folder}: {part} {name} was not saved; it is of another model or program")
        return record

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            path = self.folder / rank_file(rank, self.manifest.world_size)
            self._files[rank] = safe_open(path, framework="pt")
        return self._files[rank]


def _common(wanted: tuple[int, int, int], held: tuple[int, int, int]) -> tuple[range, range]:
    """Where the rows that two arithmetic progressions (first, count, every) share are within each of them."""
    (first, count, every), (its_first, its_count, its_every) = wanted, held
    shared = math.gcd(every, its_every)
    nothing = range(0), range(0)
    if (its_first - first) % shared or not count or not its_count:
        return nothing
    # The least k with first + k * every = its_first modulo its_every, then the least that is not before its first row.
    step, its_step = its_every // shared, every // shared
    k = (its_first - first) // shared * pow(every // shared, -1, step) % step
    row = first + k * every
    if row < its_first:
        row += -(-(its_first - row) // (step * every)) * step * every
    here, there = (row - first) // every, (row - its_first) // its_every
    number = min(-(-(count - here) // step), -(-(its_count - there) // its_step))
    if number <= 0:
        return nothing
    return range(here, here + (number - 1) * step + 1, step), range(
        there, there + (number - 1) * its_step + 1, its_step
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verifies a checkpoint, the ranks sharing its files, and opens it. Collective.

    Args:
        folder: of one step, visible to all ranks.

    Raises:
        UserError: with the same words on every rank: something of it is missing, damaged, or another user's.
    """
    read = together(lambda: read_manifest(folder))
    if len({sha256 for _, sha256 in read}) > 1:
        raise UserError(f"{folder / MANIFEST_FILE}: the ranks see different files; all must share the folder")
    manifest = read[rank()][0]
    files = sorted(manifest.files.items())[rank() :: world_size()]
    together(lambda: _verify(folder, files))
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint and the hash of its file; the other files are not looked at.

    Raises:
        UserError: it is missing, damaged, another user's, or of another step than the folder.
    """
    path = folder / MANIFEST_FILE
    check_ours(folder)
    _check_present(path, remedy(folder))
    data = path.read_bytes()
    manifest = parse(path, data, remedy(folder))
    if step_of(folder) not in (None, manifest.step):
        raise UserError(f"{path}: of step {manifest.step}, not of its folder's; {remedy(folder)}")
    expected = {rank_file(index, manifest.world_size) for index in range(manifest.world_size)}
    expected |= {name.replace(".safetensors", ".json") for name in expected}
    if expected != manifest.files.keys():
        raise UserError(f"{path}: does not list the files of {manifest.world_size} ranks; {remedy(folder)}")
    return manifest, hashlib.sha256(data).hexdigest()


def remedy(folder: Path) -> str:
    """What to do with a checkpoint that cannot be read."""
    return f"restore {folder}, or give --fallback to go on from the newest good one"


def _verify(folder: Path, files: Iterable[tuple[str, FileRecord]]) -> None:
    for name, record in files:
        path = folder / name
        _check_present(path, remedy(folder))
        size = path.stat().st_size
        if size != record.size:
            raise UserError(f"{path}: damaged, it has {size} bytes and not {record.size}; {remedy(folder)}")
        if content_sha256(path) != record.sha256:
            raise UserError(f"{path}: damaged, its content does not match its hash; {remedy(folder)}")


def _check_present(path: Path, what_to_do: str) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {what_to_do}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a regular file; {what_to_do}")
    check_ours(path)


def check_ours(path: Path) -> None:
    """Refuses what others could have written: a hash beside the data says nothing of who made both."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; name the folder of a step") from None
    if found.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{path}: owned by user {found.st_uid}; chown it to yours if you trust it")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{path}: others may write it; if you trust it: chmod -R go-w {path.parent}")
