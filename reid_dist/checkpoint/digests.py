"""One number for each part of the state, whatever the ranks: sums over the words of all pieces.

Shape suffixes: N rows of a piece, P words in one line, M blocks of them.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from reid_dist.digest import mixed, words
from reid_dist.distributed import all_gather_object
from reid_dist.pieces import Piece

_MODULUS = 1 << 64
# On a CPU torch gives so many elements to one thread: a digest beside the training takes none of its cores.
_BLOCK = 1 << 15


def piece_digest(piece: Piece) -> Tensor:
    """Sum of a piece's words, each weighted by its tensor and its place there, modulo 2^64; int64. Shape: ().

    The weight is the product of a number for the block of 2^15 places and one for the place within it: both odd and
    well mixed, see `mixed`; the second is drawn once.
    """
    rows_N = piece.rows_N.detach()
    row, flat_P = math.prod(rows_N.shape[1:]), rows_N.reshape(-1)
    start = _tensor_number(piece.part, piece.name)
    within_P = mixed(torch.arange(_BLOCK, device=flat_P.device))
    if piece.every == 1:
        return _block_digest(flat_P, piece.first * row, start, within_P)
    total = torch.zeros((), dtype=torch.int64, device=flat_P.device)
    for position in range(0, flat_P.numel(), _BLOCK):
        part_P = flat_P[position : position + _BLOCK]
        here_P = torch.arange(position, position + part_P.numel(), device=flat_P.device)
        place_P = (here_P // row * piece.every + piece.first) * row + here_P % row
        weight_P = mixed((place_P >> 15) + start) * within_P[place_P & (_BLOCK - 1)]
        total += (words(part_P) * weight_P).sum()
    return total


def _block_digest(flat_P: Tensor, first: int, start: int, within_P: Tensor) -> Tensor:
    """The digest of words at consecutive places from `first` on."""
    head = -first % _BLOCK
    parts = [part for part in (flat_P[:head], *torch.split(flat_P[head:], _BLOCK)) if part.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.int64, device=flat_P.device)
    offsets = [first % _BLOCK, *[0] * (len(parts) - 1)]
    sums_M = [(words(part) * within_P[at : at + len(part)]).sum() for part, at in zip(parts, offsets, strict=True)]
    blocks_M = torch.arange(first // _BLOCK, first // _BLOCK + len(parts), device=flat_P.device)
    return (torch.stack(sums_M) * mixed(blocks_M + start)).sum()


def _tensor_number(part: str, name: str) -> int:
    """Where a tensor's blocks begin among all numbers: far from every other tensor's."""
    return int.from_bytes(hashlib.sha256(f"{part}/{name}".encode()).digest()[:7], "little")


def digests(pieces: Iterable[Piece]) -> dict[str, int]:
    """The digest of each part, of these pieces alone; 0 to 2^64 - 1."""
    totals: dict[str, list[Tensor]] = defaultdict(list)
    for piece in pieces:
        totals[piece.part].append(piece_digest(piece))
    return {part: sum(int(x) for x in found) % _MODULUS for part, found in totals.items()}


def summed(shares: Iterable[dict[str, int]]) -> dict[str, int]:
    """The digests of the ranks' pieces together, by part in order."""
    total: dict[str, int] = defaultdict(int)
    for share in shares:
        for part, value in share.items():
            total[part] = (total[part] + value) % _MODULUS
    return dict(sorted(total.items()))


def pieces_digest(pieces: Iterable[Piece]) -> dict[str, int]:
    """The digest of each part of a state that all ranks hold together, to compare with a manifest's. Collective."""
    return summed(all_gather_object(digests(pieces)))


def as_hex(value: int) -> str:
    """A digest as manifests have it."""
    return f"{value:016x}"
