"""A loss on gathered ranks beside the same loss in one process."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import mean_over_ranks, rank, world_size


def value_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradient of every floating-point input, in one process."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves if x.grad is not None]


def _on_this_rank(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    rows = inputs[0].shape[0] // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    value, gradients = value_and_gradients(loss, *(x[own] for x in inputs))
    # The engine averages over ranks; a row's gradient lives on its owner alone.
    return mean_over_ranks(value), [gradient / world_size() for gradient in gradients]


@pytest.fixture
def assert_ranks_equal_one_process(run_ranks: Callable[..., list]) -> Callable[..., None]:
    """Checks `loss(*inputs)` on `worlds` of ranks, rows shared out in order, against one process."""

    def check(loss: Callable[..., Tensor], *inputs: Tensor, worlds: tuple[int, ...] = (2, 3)) -> None:
        expected_value, expected_gradients = value_and_gradients(loss, *inputs)
        for world in worlds:
            found = run_ranks(world, _on_this_rank, loss, *inputs)
            for value, _ in found:
                torch.testing.assert_close(value, expected_value.double(), rtol=1e-12, atol=1e-12)
            for i, gradient in enumerate(expected_gradients):
                gathered = torch.cat([gradients[i] for _, gradients in found])
                torch.testing.assert_close(gathered, gradient, rtol=1e-10, atol=1e-12)

    return check
