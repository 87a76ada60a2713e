"""What the operations of a training step multiply and move, counted on tensors without memory.

An operation takes the longest of three: its products at the GPU's rate, its bytes in and out at the memory's, and its
launch (a roofline, Williams et al. 2009). Shape suffixes as in the stages.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import reid_dist.kernels.operators  # noqa: F401 (torch.ops.reid_dist has what it registers)
from reid_dist.planning.assumptions import Assumptions

_NARROW = (torch.bfloat16, torch.float16)
_MAKES_ONLY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def _products(a_BD: Tensor, b_KD: Tensor, count: int) -> int:
    return 2 * count * a_BD.shape[0] * b_KD.shape[0] * a_BD.shape[1]


# Our own operators: products of all rows with all columns that each of them makes.
_OWN = {"queue_attend": 2, "pair_statistics": 1, "pair_gradients": 3, "siglip": 1, "siglip_gradients": 3}


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations: also of fake tensors, and of a backward that runs within.

    Attributes:
        operations: how many there were of the same (FLOPs, bytes, in half precision).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[tuple[int, int, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator, then counts it."""
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        if not self._is_free(func, given, made):
            flops = _flops(func, args, kwargs, results)
            moved = sum(_nbytes(x) for x in (*given, *made))
            narrow = any(x.dtype in _NARROW for x in given)
            self.operations[flops, moved, narrow] += 1
        return results

    @staticmethod
    def _is_free(func: Any, given: Iterable[Tensor], made: list[Tensor]) -> bool:
        """Views and bare allocations, and collectives, which are counted elsewhere."""
        if func.namespace in ("c10d", "prim") or not made or func._opname in _MAKES_ONLY:
            return True
        storages = {x.untyped_storage()._cdata for x in given}
        return not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in made)

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(flops * count for (flops, _, _), count in self.operations.items())

    @property
    def moved_bytes(self) -> int:
        """Read and written by all operations."""
        return sum(moved * count for (_, moved, _), count in self.operations.items())

    @property
    def count(self) -> int:
        """Operations."""
        return self.operations.total()

    def seconds(self, assumed: Assumptions) -> float:
        """Time of all of them, one after the other."""
        total = 0.0
        for (flops, moved, narrow), count in self.operations.items():
            rate = (assumed.bf16_tflops if narrow else assumed.fp32_tflops) * 1e12
            busy = max(flops / rate, moved / (assumed.memory_gbs * 1e9)) / assumed.utilisation
            total += count * max(busy, assumed.operation_us / 1e6)
        return total


def _flops(func: Any, args: Any, kwargs: Any, results: Any) -> int:
    if func.namespace == "reid_dist":
        times = _OWN.get(func._opname, 0)  # the others add up
        return _products(args[0], args[1], times) if times else 0
    formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=results))


def _nbytes(x: Tensor) -> int:
    """What an expanded tensor repeats is read from the cache."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
