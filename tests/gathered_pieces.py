"""The pieces of all ranks put together, to look at and to read from as from a checkpoint."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.pieces import Piece

Whole = dict[str, dict[str, Tensor]]  # tensors by part and name


def gather(pieces: Iterable[Piece]) -> Whole:
    """Whole tensors, the same on every rank; each row must have come from exactly one. Collective."""
    own = [(p.part, p.name, p.first, p.every, p.total, p.shape, p.rows_N.detach().cpu().clone()) for p in pieces]
    of_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    whole: Whole = {}
    seen: dict[tuple[str, str], Tensor] = {}
    for part, name, first, every, total, shape, rows_N in (piece for held in of_ranks for piece in held):
        known = whole.setdefault(part, {}).setdefault(name, rows_N.new_empty(total, *rows_N.shape[1:]))
        assert len(known) == total and len(rows_N) > 0 and torch.Size(shape).numel() in (total, known.numel())
        known[first : first + every * len(rows_N) : every] = rows_N
        seen.setdefault((part, name), torch.zeros(total))[first : first + every * len(rows_N) : every] += 1
    for which, count_N in seen.items():
        assert (count_N == 1).all(), which
    return {part: dict(sorted(named.items())) for part, named in sorted(whole.items())}


class Gathered:
    """A `Saved` of what `gather` found."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole

    def names(self, part: str) -> list[str]:
        return sorted(self.whole.get(part, {}))

    def total(self, part: str, name: str) -> int:
        found = self.whole.get(part, {}).get(name)
        if found is None:
            raise UserError(f"checkpoint: has no {part} {name}")
        return len(found)

    def rows(self, part: str, name: str, first: int, count: int, every: int = 1) -> Tensor:
        found = self.whole.get(part, {}).get(name)
        if found is None or first + (count - 1) * every >= len(found):
            raise UserError(f"checkpoint: has not {count} rows of {part} {name}")
        return found[first : first + (count - 1) * every + 1 : every].clone()


def differing(a: Whole, b: Whole) -> list[str]:
    """Names of tensors that are not the same, bit by bit."""
    flat_a, flat_b = ({f"{part} {name}": x for part, named in y.items() for name, x in named.items()} for y in (a, b))
    return sorted(n for n in {*flat_a, *flat_b} if n not in flat_a or n not in flat_b or not flat_a[n].equal(flat_b[n]))
