from collections.abc import Callable

import pytest
import torch

from reid_dist import distributed
from reid_dist.distributed import all_gather, all_gather_ragged, all_gather_with_grad, mean_over_ranks, rank, world_size


def _gather() -> torch.Tensor:
    return all_gather(torch.tensor([[rank(), 10 + rank()]]))


def test_all_gather_is_in_rank_order_on_every_rank(run_ranks: Callable) -> None:
    for found in run_ranks(3, _gather):
        assert found.tolist() == [[0, 10], [1, 11], [2, 12]]


def _gather_transposed() -> torch.Tensor:
    return all_gather(torch.arange(6).view(2, 3).T + 100 * rank())


def test_all_gather_takes_tensors_that_are_not_contiguous(run_ranks: Callable) -> None:
    block = torch.arange(6).view(2, 3).T
    assert run_ranks(2, _gather_transposed)[0].equal(torch.cat([block, block + 100]))


def _ragged(counts: list[int]) -> list[torch.Tensor]:
    return all_gather_ragged(torch.full((counts[rank()], 2), float(rank() + 1)))


@pytest.mark.parametrize("counts", [[1, 3], [2, 0, 1], [0, 0, 4], [0, 0]])
def test_ragged_gather_keeps_every_rank_s_rows_and_no_padding(counts: list[int], run_ranks: Callable) -> None:
    for found in run_ranks(len(counts), _ragged, counts):
        assert [tuple(part.shape) for part in found] == [(count, 2) for count in counts]
        for owner, part in enumerate(found):
            assert bool((part == owner + 1).all())


def _gradient(weights: torch.Tensor) -> torch.Tensor:
    x = torch.ones(2, 3, dtype=torch.float64) * (rank() + 1)
    x.requires_grad_()
    gathered = all_gather_with_grad(x)
    # A different weight for each (reader, row): the owner must receive the sum over readers.
    (gathered * weights[rank()][:, None]).sum().backward()
    assert x.grad is not None
    return x.grad


def test_backward_sends_every_reader_s_gradient_to_the_row_s_owner(run_ranks: Callable) -> None:
    weights = torch.tensor([[1.0, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60], [100, 200, 300, 400, 500, 600]]).double()
    total = weights.sum(dim=0)
    for owner, found in enumerate(run_ranks(3, _gradient, weights)):
        assert found.equal(total[2 * owner : 2 * owner + 2, None].expand(2, 3))


def _gradient_kept() -> torch.Tensor:
    gradient = torch.full((4, 3), float(rank() + 1))
    x = torch.zeros(2, 3, requires_grad=True)
    all_gather_with_grad(x).backward(gradient)
    return gradient


def test_backward_leaves_the_gradient_that_it_got_alone(run_ranks: Callable) -> None:
    """Autograd may hand the same tensor to others; an all-reduce in place would corrupt theirs."""
    for owner, found in enumerate(run_ranks(2, _gradient_kept)):
        assert found.equal(torch.full((4, 3), float(owner + 1)))


def _mean() -> torch.Tensor:
    return mean_over_ranks(torch.tensor([1.0 + rank()], dtype=torch.bfloat16))


def test_mean_over_ranks_is_float64_and_leaves_its_input_alone(run_ranks: Callable) -> None:
    for found in run_ranks(2, _mean):
        assert found.dtype == torch.float64 and found.item() == 1.5
    single = torch.tensor([2.0], dtype=torch.float64)
    mean_over_ranks(single).add_(1)
    assert single.item() == 2.0


def _broadcast() -> tuple[int, str]:
    return world_size(), distributed.broadcast_object({"from": rank()})["from"]


def test_broadcast_gives_rank_0_s_object_to_all(run_ranks: Callable) -> None:
    assert run_ranks(2, _broadcast) == [(2, 0), (2, 0)]


def test_without_a_process_group_the_world_is_one() -> None:
    x = torch.ones(2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert all_gather_with_grad(x) is x
    assert not all_gather(x).requires_grad
    assert [part.tolist() for part in all_gather_ragged(x)] == [[1.0, 1.0]]
    assert distributed.broadcast_object("same") == "same"
    distributed.barrier()


def test_environment_without_a_launcher_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that monkeypatch takes away again what the function adds.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert (distributed.environment_rank(), distributed.environment_world_size()) == (0, 1)
    distributed.set_single_process_environment()
    import os

    assert os.environ["WORLD_SIZE"] == "1" and 0 < int(os.environ["MASTER_PORT"]) < 65536


def test_environment_of_a_launcher_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    distributed.set_single_process_environment()
    import os

    assert (distributed.environment_rank(), distributed.environment_world_size()) == (3, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node7", "1234")
