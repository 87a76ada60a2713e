import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist import distributed
from reid_dist.distributed import (
    all_gather,
    all_gather_ragged,
    all_gather_with_grad,
    all_to_all,
    check_equal_on_ranks,
    mean_over_ranks,
    rank,
    start_all_gather,
    sum_over_ranks,
    world_size,
)
from reid_dist.errors import DivergenceError, UserError


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


def _mixed(rows: int) -> list[torch.Tensor]:
    return [
        torch.full((rows, 3), 1 + rank(), dtype=torch.bfloat16).T.contiguous().T,  # columns first in memory
        torch.arange(rows, dtype=torch.int32) + 10 * rank(),
        torch.full((rows, 1, 2), 0.1 + rank(), dtype=torch.float64),
        torch.full((1,), rank(), dtype=torch.uint8),
        torch.zeros(rows, 0),
    ]


def _packed(rows: int) -> tuple[list[torch.Tensor], bool]:
    mine = _mixed(rows)
    mine[0].requires_grad_()
    gather = start_all_gather(mine)
    mine[1].zero_()  # already copied
    all_gather(torch.zeros(1))  # another collective overtakes
    found = gather.wait()
    # Copies: torch.save refuses one memory seen as several dtypes.
    return [x.clone() for x in found], all(x.equal(y) for x, y in zip(found, gather.wait(), strict=True))


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_packed_gather_brings_every_dtype_in_rank_order(ranks: int, rows: int, run_ranks: Callable) -> None:
    for found, again in run_ranks(ranks, _packed, rows):
        assert again and not found[0].requires_grad
        bf16, int32, float64, uint8, empty = found
        owner = torch.arange(ranks).repeat_interleave(rows)
        assert bf16.equal((1 + owner)[:, None].expand(-1, 3).bfloat16())
        assert int32.equal((10 * owner + torch.arange(rows).repeat(ranks)).int())
        assert float64.equal((0.1 + owner.double())[:, None, None].expand(-1, 1, 2))
        assert uint8.tolist() == list(range(ranks)) and empty.shape == (ranks * rows, 0)


def _exchanged(rows: int) -> torch.Tensor:
    sent = [[100.0 * rank() + 10 * to + row for row in range(rows)] for to in range(world_size())]
    return all_to_all(torch.tensor(sent).view(world_size() * rows, 1).expand(-1, 2))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_all_to_all_sends_block_w_to_rank_w(rows: int, run_ranks: Callable) -> None:
    for ranks in (1, 2, 3):
        for to, found in enumerate(run_ranks(ranks, _exchanged, rows)):
            expected = [100.0 * sender + 10 * to + row for sender in range(ranks) for row in range(rows)]
            assert found.tolist() == [[x, x] for x in expected]


def _sum() -> list[int]:
    x = torch.tensor([2**62 + rank(), 1])
    total = sum_over_ranks(x)
    assert x.tolist() == [2**62 + rank(), 1]
    return total.tolist()


def test_a_sum_of_integers_over_ranks_wraps(run_ranks: Callable) -> None:
    assert run_ranks(2, _sum) == [[2**63 + 1 - 2**64, 2]] * 2


def _compare(values: list[int]) -> str:
    try:
        check_equal_on_ranks(torch.tensor(values[rank()]), "the thing")
    except DivergenceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7, 7, 7], ""),
        ([-(2**63)], ""),
        ([2**62, 2**62, 2**62 + 1], "rank 2 of 3 diverged from the others"),
        ([5, 1, 1, 2, 1], "ranks 0, 3 of 5 diverged from the others"),
        ([1, 2], "on all ranks: two ranks differ; continue"),
        ([1, 1, 2, 2], "no majority of the 4 ranks agrees"),
        ([1, 2, 3], "no majority"),
    ],
)
def test_the_ranks_that_differ_are_named_on_all(values: list[int], expected: str, run_ranks: Callable) -> None:
    for found in run_ranks(len(values), _compare, values):
        assert expected in found and bool(found) == bool(expected)
        assert not found or found.startswith("the thing is not the same on all ranks: ")


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


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_environment_without_a_launcher_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        # Set first, so that monkeypatch takes away again what the function adds.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert (distributed.environment_rank(), distributed.environment_world_size()) == (0, 1)
    distributed.set_single_process_environment()
    assert os.environ["WORLD_SIZE"] == "1" and 0 < int(os.environ["MASTER_PORT"]) < 65536


def test_environment_of_a_launcher_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    distributed.set_single_process_environment()
    assert (distributed.environment_rank(), distributed.environment_world_size()) == (3, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node7", "1234")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets SLURM's variables as task 3 of 5 on three nodes sees them, and no launcher's; `step(name=value)` changes."""

    def set_variables(**changes: str | None) -> None:
        seen = {"PROCID": "3", "LOCALID": "1", "NODEID": "1", "NTASKS": "5", "JOB_ID": "7"}
        seen |= {"STEP_NUM_TASKS": "5", "STEP_TASKS_PER_NODE": "2(x2),1"} | changes
        for name in LAUNCHER:  # set first, so that monkeypatch takes away again what is added
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in seen.items():
            monkeypatch.setenv(f"SLURM_{name}", value or "")
            if value is None:
                monkeypatch.delenv(f"SLURM_{name}")

    return set_variables


def test_a_task_of_srun_takes_its_place_from_the_step(step: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    step()
    assert (distributed.environment_rank(), distributed.environment_world_size()) == (3, 5)
    assert os.environ["LOCAL_RANK"] == "1" and os.environ["LOCAL_WORLD_SIZE"] == "2"
    step(PROCID="4", LOCALID="0", NODEID="2")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    with pytest.raises(UserError, match=r"^MASTER_PORT not set, where the 5 tasks.*\$\(scontrol show hostnames"):
        distributed.initialize(torch.device("cpu"))
    assert os.environ["LOCAL_WORLD_SIZE"] == "1"


def test_a_script_of_sbatch_a_single_task_and_other_launchers_are_left_alone(
    step: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    batch = {**alone, "STEP_NUM_TASKS": None, "STEP_TASKS_PER_NODE": None}
    for variables in (batch, {**alone, "STEP_NUM_TASKS": "1", "STEP_TASKS_PER_NODE": "1"}):
        step(**variables)
        assert (distributed.environment_rank(), distributed.environment_world_size()) == (0, 1)
        distributed.set_single_process_environment()
        assert os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_ADDR"] == "127.0.0.1"
    step()
    monkeypatch.setenv("RANK", "1")  # torchrun or deepspeed, started by srun on each node
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert (distributed.environment_rank(), distributed.environment_world_size()) == (1, 6)


MEET = """
import json, os, torch
from reid_dist import distributed
distributed.initialize(distributed.local_device(), timeout_s=60)
print(json.dumps(distributed.all_gather_object([distributed.rank(), os.environ["LOCAL_RANK"]])))
distributed.shutdown()
"""


def test_processes_with_slurm_variables_alone_meet() -> None:
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port()), "SLURM_NODEID": "0"}
    clean |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", MEET], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
            env=clean | {"SLURM_PROCID": place, "SLURM_LOCALID": place},
        )
        for place in "01"
    ]  # fmt: skip
    found = [task.communicate(timeout=120)[0] for task in tasks]
    assert [json.loads(each) for each in found] == [[[0, "0"], [1, "1"]]] * 2
