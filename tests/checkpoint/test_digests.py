"""Digests of parts: of every bit and its place, and of nothing else."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from reid_dist.checkpoint.digests import as_hex, digests, pieces_digest, summed
from reid_dist.pieces import Piece
from tests.checkpoint import states


def digest_of(x: Tensor, name: str = "a", part: str = "weights") -> int:
    return digests([Piece(part, name, x, len(x))])[part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_cuts_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2 if dtype is torch.bool else 200, (100_000, 3)).to(dtype)
    whole = Piece("weights", "a", x, len(x))
    cuts = [0, 1, 10_922, 10_923, 40_000, 100_000]
    blocks = [replace(whole, rows_N=x[a:b], first=a) for a, b in pairwise(cuts)]
    turns = [replace(whole, rows_N=x[k::7], first=k, every=7) for k in range(7)]
    expected = digests([whole])
    assert summed(digests([piece]) for piece in blocks) == expected
    assert summed(digests([piece]) for piece in turns) == expected
    assert digests([*blocks[:2], replace(whole, rows_N=x[cuts[2] :], first=cuts[2])]) == expected


def test_every_bit_and_its_place_counts() -> None:
    x = torch.arange(70_000.0)
    found = {digest_of(x)}
    for index, bit in ((0, 0), (1, 31), (32_767, 5), (32_768, 5), (69_999, 30)):
        changed = x.clone()
        changed.view(torch.int32)[index] ^= -(2**31) if bit == 31 else 1 << bit
        found.add(digest_of(changed))
    swapped = x.clone()
    swapped[[3, 32_771]] = x[[32_771, 3]]
    found |= {digest_of(swapped), digest_of(x.roll(1)), digest_of(x, "b"), digest_of(x, part="frozen")}
    assert len(found) == 10


def test_no_rows_add_nothing() -> None:
    nothing = Piece("weights", "a", torch.empty(0), 0)
    assert digests([nothing]) == {"weights": 0}
    assert pieces_digest([nothing, Piece("step", "b", torch.tensor([5]), 1)])["weights"] == 0


def test_a_digest_has_sixteen_digits() -> None:
    assert as_hex(255) == "00000000000000ff"


def _of_ranks() -> dict[str, int]:
    return pieces_digest(states.pieces(3))


def test_ranks_do_not_matter(run_ranks) -> None:
    alone = _of_ranks()
    assert set(alone) == {"weights", "exp_avg", "step", "queue"}
    assert run_ranks(2, _of_ranks) == [alone] * 2
    assert run_ranks(3, _of_ranks) == [alone] * 3
