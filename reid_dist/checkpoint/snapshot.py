"""A copy of a rank's state in host memory; the files are written from it while training changes the state itself.

Shape suffixes: N rows of a piece, X bytes of a slab.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reid_dist.checkpoint.manifest import private_key, tensor_key
from reid_dist.checkpoint.private import Private, as_json, private_sha256
from reid_dist.checkpoint.tensor_file import DTYPES
from reid_dist.pieces import Piece

_SLAB = 64 << 20  # bytes; a larger tensor has a slab of its own
_ALIGNMENT = 64  # bytes


class HostMemory:
    """Host memory that the snapshots of one run use in turn, pinned where they come from a GPU.

    Pages that were written once are there: later snapshots take half the time of the first.
    """

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._used: list[int] = []
        self._from_gpu = False

    def clear(self) -> None:
        """Lets go of what was copied; the memory stays."""
        self._used = [0] * len(self._slabs)

    def copy(self, x: Tensor) -> Tensor:
        """A contiguous copy; from a GPU it is there after `wait`."""
        self._from_gpu |= x.is_cuda
        held = self._take(x.numel() * x.itemsize, x.is_cuda).view(x.dtype).view(x.shape)
        return held.copy_(x.detach(), non_blocking=True)

    def wait(self) -> None:
        """Waits for the copies; does not touch a GPU that nothing came from."""
        if self._from_gpu:
            torch.cuda.current_stream().synchronize()

    def _take(self, size: int, pinned: bool) -> Tensor:
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        for index, slab_X in enumerate(self._slabs):
            start = self._used[index]
            if slab_X.numel() - start >= room and slab_X.is_pinned() == pinned:
                self._used[index] += room
                return slab_X[start : start + size]
        self._slabs.append(torch.empty(max(room, _SLAB), dtype=torch.uint8, pin_memory=pinned))
        self._used.append(room)
        return self._slabs[-1][:size]


@dataclass(frozen=True)
class Snapshot:
    """A rank's state at one step.

    Attributes:
        pieces: on the host.
        tensors: the rank's own, by name.
        values: the rank's own, as JSON.
        private: hash of both.
    """

    pieces: list[Piece]
    tensors: dict[str, Tensor]
    values: bytes
    private: str

    def keyed(self) -> dict[str, Tensor]:
        """Everything that goes into the file of tensors, under its name there."""
        held = [piece for piece in self.pieces if piece.rows_N.shape[0]]
        found = {tensor_key(piece.part, piece.name, piece.first): piece.rows_N for piece in held}
        return {**found, **{private_key(name): x for name, x in self.tensors.items()}}

    def table(self, rank: int) -> dict[tuple[str, str], dict[str, Any]]:
        """The fields of `TensorRecord` for each tensor that there are pieces of, by part and name."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for piece in self.pieces:
            record = found.setdefault((piece.part, piece.name), _described(piece))
            if piece.rows_N.shape[0]:
                record["pieces"].append((rank, piece.first, piece.every, piece.rows_N.shape[0]))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.itemsize for x in self.keyed().values()) + len(self.values)


def take_snapshot(pieces: Iterable[Piece], private: Private, memory: HostMemory) -> Snapshot:
    """Copies a rank's state; returns when the original is no longer needed.

    Raises:
        ValueError: a value has no JSON form.
    """
    memory.clear()
    tensors = {name: memory.copy(x) for name, x in private.tensors.items()}
    memory.wait()
    values = as_json(private.values)
    own = Snapshot([], tensors, values, private_sha256(Private(tensors, private.values)))
    return with_pieces(own, pieces, memory)


def with_pieces(snapshot: Snapshot, pieces: Iterable[Piece], memory: HostMemory) -> Snapshot:
    """A snapshot with copies of more pieces; returns when the originals are no longer needed."""
    held = [replace(piece, rows_N=memory.copy(piece.rows_N)) for piece in pieces]
    memory.wait()
    return replace(snapshot, pieces=[*snapshot.pieces, *held])


def _described(piece: Piece) -> dict[str, Any]:
    row = list(piece.rows_N.shape[1:])
    shape = [piece.total, *row]
    if math.prod(piece.shape) == math.prod(shape):  # a scalar's is empty
        shape = list(piece.shape)
    return {"dtype": DTYPES[piece.rows_N.dtype], "total": piece.total, "row": row, "shape": shape, "pieces": []}
