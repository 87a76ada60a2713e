"""Reused buffers of the chunked backend, and the one product that it is made of.

Fresh memory is slow to touch for the first time (most of what naive torch loses on a CPU), so tiles live in buffers
that each thread keeps. They are never results of an operator: autograd and torch.compile do not see them.
Shape suffixes: R rows and C columns of a tile, D features.
"""

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def buffer(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, room: int = 0) -> Tensor:
    """Uninitialised memory that the next call of this name reuses; on a GPU, the caching allocator's.

    Args:
        name: one buffer each.
        shape: of the result.
        like: a tensor on the same device.
        dtype: of the result.
        room: elements that later calls will want; growing would have old and new memory live together.
    """
    count = math.prod(shape)
    if like.device.type != "cpu":
        # Its allocator knows about streams; a buffer kept here would be shared between them.
        return torch.empty(shape, dtype=dtype, device=like.device)
    flat: Tensor | None = getattr(_kept, f"{name}_{dtype}", None)
    if flat is None or flat.numel() < count:
        # Made in inference mode, it could not be written outside.
        with torch.inference_mode(False):
            flat = torch.empty(max(count, room), dtype=dtype)
        setattr(_kept, f"{name}_{dtype}", flat)
    return flat[:count].view(shape)


def on_tensor_cores(*tensors: Tensor) -> bool:
    """Whether products of these are bfloat16 with float32 sums: on a GPU, where the second operand is bfloat16.

    Elsewhere operands are widened: a CPU's bfloat16 product rounds its RESULT to bfloat16. float16 is widened too, the
    weights of a gradient underflow in it.
    """
    return tensors[-1].device.type == "cuda" and tensors[-1].dtype == torch.bfloat16


def product(left_RD: Tensor, right_DC: Tensor, name: str, room: int = 0) -> Tensor:
    """Matrix product in a reused buffer; float32 from bfloat16 on tensor cores, else in the dtype of both."""
    shape = (left_RD.shape[0], right_DC.shape[1])
    if on_tensor_cores(right_DC):
        return torch.mm(left_RD.to(right_DC.dtype), right_DC, out_dtype=torch.float32)
    return torch.mm(left_RD, right_DC, out=buffer(name, shape, left_RD, left_RD.dtype, room))
