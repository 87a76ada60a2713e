"""What the chunked backend allocates: linear in B, flat in K. Counted are live bytes of storages, not process size."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reid_dist.kernels import chunked, chunked_pairs, workspace
from reid_dist.kernels.contrastive import moco_nce

MASKS = {"identity": 0, "none": 1, "positives": 2}


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations make, from birth to death."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self.known.add(x.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                self._born(x.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._died, storage.nbytes())

    def _died(self, nbytes: int) -> None:
        self.live -= nbytes


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes alive at once that `function` made, buffers included (they are dropped before)."""
    workspace._kept.__dict__.clear()
    with LiveBytes() as counter:
        function()
    workspace._kept.__dict__.clear()
    return counter.peak


def kernel_bytes(queue_case: Callable, mask: str, dtype: torch.dtype = torch.float32, **size: Any) -> int:
    case = queue_case(**{"features": 32, "people": 300, **size}, dtype=dtype)
    return peak_bytes(lambda: chunked.queue_attend(*case.attend(), MASKS[mask]))


def test_the_counter_counts() -> None:
    def run() -> torch.Tensor:
        x = torch.ones(1000)
        for _ in range(3):
            x = x + 1  # old and new live together
        return x.view(10, 100)

    assert peak_bytes(run) == 8000


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_kernel_is_flat_in_the_number_of_keys(queue_case: Callable, mask: str, dtype: torch.dtype) -> None:
    small, large = (kernel_bytes(queue_case, mask, dtype, rows=512, keys=keys) for keys in (8192, 65536))
    assert large <= 1.1 * small
    # The products of all pairs alone would be 128 MB.
    assert large < 10e6


def test_the_kernel_is_linear_in_the_number_of_anchors(queue_case: Callable) -> None:
    sizes = [kernel_bytes(queue_case, "identity", rows=rows, keys=4096) for rows in (1024, 2048, 4096)]
    per_row = [(b - a) / n for a, b, n in zip(sizes, sizes[1:], (1024, 2048), strict=False)]
    # The mean key, lse and what autograd needs: a few rows of D floats.
    assert all(0 < growth < 4 * 32 * 4 for growth in per_row)


def test_forward_and_backward_need_a_twentieth_of_naive(queue_case: Callable) -> None:
    """The gate of the issue, at a quarter of its size: 512 x 16384 x 512."""
    case = queue_case(512, 16384, 512, people=3000).leaves()
    outside = peak_bytes(lambda: moco_nce(*case, backend="chunked").sum().backward())
    detached = [x.detach() for x in case.attend()]
    inside = peak_bytes(lambda: chunked.queue_attend(*detached, MASKS["identity"]))
    naive = peak_bytes(lambda: moco_nce(*case, backend="reference").sum().backward())
    # Products, weights and their gradients in float32: three tensors of B x K at least.
    assert naive > 3 * 512 * 16384 * 4
    # A quarter of the keys is a quarter of naive's memory, not of ours.
    assert outside + inside < 0.05 * 4 * naive


def test_pairs_keep_no_product_matrix(queue_case: Callable) -> None:
    case = queue_case(2048, 4096, 16, people=300, random=0.0)
    matrix = 2048 * 4096 * 4

    def run() -> None:
        row_SB, column_SG = chunked_pairs.pair_statistics(*case.attend(), 1, True)
        coefficients = torch.ones_like(row_SB[1:]), torch.ones_like(column_SG[1:])
        chunked_pairs.pair_gradients(*case.attend(), 1, row_SB[0], column_SG[0], *coefficients)

    assert peak_bytes(run) < matrix / 2


def test_buffers_are_reused(queue_case: Callable) -> None:
    case = queue_case(64, 4096, 32)
    chunked.queue_attend(*case.attend(), 0)
    kept = {name: x.data_ptr() for name, x in workspace._kept.__dict__.items()}
    chunked.queue_attend(*case.attend(), 0)
    assert kept and {name: x.data_ptr() for name, x in workspace._kept.__dict__.items()} == kept
