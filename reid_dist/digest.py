"""A hash of tensors that is a sum: made on the device without a host sync, and compared between ranks as one number."""

from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK = 1 << 22


def words(x: Tensor) -> Tensor:
    """The raw words of a tensor as int64: equal for equal bits only. Same shape."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]).long()


def mixed(index: Tensor) -> Tensor:
    """An odd, well mixed int64 for each index (the finaliser of splitmix64, Steele et al. 2014, on signed integers).

    Odd, so that no single changed word can vanish modulo 2^64; mixed, so that changes at several places do not cancel.
    """
    x = (index + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


def digest(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Position-weighted sum of the tensors' raw words, modulo 2^64: of all bits in their order, and of nothing else.

    Args:
        tensors: on one device, in an order that every rank keeps.
        device: theirs.

    Returns:
        int64. Shape: ().
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    position = 0
    for tensor in tensors:
        for block in torch.split(tensor.detach().flatten(), _BLOCK):
            total += (words(block) * mixed(torch.arange(position, position + block.numel(), device=device))).sum()
            position += block.numel()
    return total
