import pytest
import torch

from reid_dist import digest as module
from reid_dist.digest import digest

CPU = torch.device("cpu")


def mixed_oracle(index: int) -> int:
    """Splitmix64's finaliser with arithmetic shifts, on Python's integers."""

    def signed(x: int) -> int:
        return (x + (1 << 63)) % (1 << 64) - (1 << 63)

    x = signed((index + 1) * 0x9E3779B97F4A7C15)
    x = signed((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9)
    x = signed((x ^ (x >> 27)) * 0x94D049BB133111EB)
    return (x ^ (x >> 31)) | 1


@pytest.mark.parametrize("block", [1, 3, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_it_is_the_weighted_sum_of_the_words(dtype: torch.dtype, block: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).mul(9).to(dtype) for shape in ((3, 5), (), (1,), (0, 4), (7,))]
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
    words = [int(word) for x in tensors for word in x.view(integer).flatten()]
    expected = sum(word * mixed_oracle(i) for i, word in enumerate(words)) % (1 << 64)
    assert int(digest(tensors, CPU)) % (1 << 64) == expected


def test_every_bit_and_every_place_counts() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = int(digest([x], CPU))
    for place in range(12):
        for bit in range(32):
            changed = x.clone()
            changed.view(torch.int32).view(-1)[place] ^= torch.tensor(1 << bit).to(torch.int32)
            assert int(digest([changed], CPU)) != before
    for a in range(12):
        for b in range(a):
            swapped = x.flatten()
            swapped[[a, b]] = swapped[[b, a]]
            assert int(digest([swapped], CPU)) != before


def test_layout_in_memory_does_not_count() -> None:
    x = torch.randn(3, 4)
    assert digest([x.T], CPU).equal(digest([x.T.contiguous()], CPU))
    assert digest([], CPU).equal(torch.zeros((), dtype=torch.int64))
