"""The state of a run in training, as its ranks hold it: rows of named tensors that together are whole.

Nothing here depends on how many ranks there are: a checkpoint of two ranks is read by one or three, since every rank
asks for the rows that it holds now. Weights and moments are cut as engines cut them, anywhere in the flat tensor; their
rows are single elements.

Shape suffixes: N rows of a piece.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from reid_dist.distributed import rank, world_size
from reid_dist.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor, held by one rank; of all ranks' pieces of it each row is in exactly one.

    Attributes:
        part: of the state, such as `weights` or `queue`; a digest is made of each.
        name: of the tensor within the part.
        rows_N: the rows, on any device; not copied, unless they have to be. Shape: (N, ...).
        total: rows of the whole tensor.
        first: number of the first row.
        every: distance of two rows in the whole tensor: 1 for a block.
        shape: of the whole tensor; its product is `total` where rows are single elements.
    """

    part: str
    name: str
    rows_N: Tensor
    total: int
    first: int = 0
    every: int = 1
    shape: tuple[int, ...] = ()


class Saved(Protocol):
    """A verified checkpoint, to read from."""

    def names(self, part: str) -> list[str]:
        """The tensors of a part, sorted; empty for a part that was not saved."""

    def total(self, part: str, name: str) -> int:
        """Rows of a tensor.

        Raises:
            UserError: there is no such tensor.
        """

    def rows(self, part: str, name: str, first: int, count: int, every: int = 1) -> Tensor:
        """Rows first, first + every, ... of a tensor, on the CPU, in the dtype that was saved. Shape: (count, ...).

        Raises:
            UserError: there is no such tensor, or it has fewer rows.
        """


def shared_rows(part: str, name: str, whole_SX: Tensor) -> Iterator[Piece]:
    """This rank's even share of the rows of a tensor that all ranks hold alike. Shape: (S, ...)."""
    total = len(whole_SX)
    first, stop = (total * index // world_size() for index in (rank(), rank() + 1))
    if stop > first:
        yield Piece(part, name, whole_SX.detach()[first:stop], total, first, shape=tuple(whole_SX.shape))


def shared_out(part: str, name: str, whole: Tensor) -> Iterator[Piece]:
    """This rank's even share of the elements of a tensor that all ranks hold alike; none, where there are few."""
    for piece in shared_rows(part, name, whole.reshape(-1)):
        yield replace(piece, shape=tuple(whole.shape))


def read_whole(saved: Saved, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that `shared_out` has cut, on the CPU.

    Raises:
        UserError: it was not saved, or in another size.
    """
    total, expected = saved.total(part, name), math.prod(shape)
    if total != expected:
        raise UserError(f"checkpoint: {part} {name} has {total} elements, not {expected}; it is of another model")
    return saved.rows(part, name, 0, math.prod(shape)).reshape(shape)
