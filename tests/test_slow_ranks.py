"""Who is slow: real ranks that sleep in different parts of a step, and ranks that are equal on a busy machine."""

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from reid_dist.distributed import (
    Moment,
    all_gather,
    all_to_all,
    mean_over_ranks,
    note_waits,
    rank,
    start_all_gather,
    sum_over_ranks,
    world_size,
)
from reid_dist.slow_ranks import OwnWork

CPU = torch.device("cpu")
USUAL_S = 0.008


def _run(steps: int, log_every: int, where: str, factor: float, late_at: list[int] | None = None) -> list[str]:
    """The lines of a stage whose rank 1 takes `factor` times as long in one part of its steps."""
    work, lines = OwnWork(CPU, 0.75), []
    work.start()
    for step in range(steps):
        slow = rank() == 1 and (late_at is None or step in late_at)
        for part in ("data", "before", "between", "backward"):
            time.sleep(USUAL_S * (factor if slow and part == where else 1))
            if part == "before":
                all_gather(torch.zeros(1))
            if part == "between":
                start_all_gather([torch.zeros(1)]).wait()
                work.reached()
                work.reached()  # of a second micro-batch
        dist.all_reduce(torch.zeros(1))  # an engine's own
        if (step + 1) % log_every == 0:
            time.sleep(0.02 * (rank() == 0))  # rank 0 writes the log
            lines.append(work.slow(mean_over_ranks(work.report()).tolist()))
        work.start()
    work.close()
    waits = work._waits
    all_gather(torch.zeros(1))
    assert waits == []  # nobody counts any more
    return lines


@pytest.mark.parametrize(("where", "ranks"), [("data", 2), ("before", 3), ("between", 2)])
def test_a_rank_five_times_as_slow_is_named_at_the_second_report(where: str, ranks: int, run_ranks: Callable) -> None:
    results = run_ranks(ranks, _run, 21, 10, where, 13.0)  # one part of three: five times the work of a step
    assert all(lines == results[0] for lines in results)
    first, second = results[0]
    assert first == ""
    named = re.fullmatch(r"rank 1 is slow \((\S+) s of own work a step, the others (\S+) s\)", second)
    assert named, second
    slow, others = map(float, named.groups())
    assert slow >= 15 * USUAL_S and 3 * USUAL_S <= others < 0.75 * slow


def test_equal_ranks_and_those_that_hiccup_are_not_named(run_ranks: Callable) -> None:
    """Also while rank 0 is late with the log, which is not work of a step."""
    assert run_ranks(3, _run, 40, 8, "data", 1.0) == [[""] * 5] * 3
    assert run_ranks(2, _run, 40, 8, "data", 40.0, [3, 12, 20, 28, 36]) == [[""] * 5] * 2


def test_a_rank_that_is_slow_in_backward_alone_is_not_seen(run_ranks: Callable) -> None:
    """As the file's head says; nobody else is blamed for it either."""
    assert run_ranks(2, _run, 32, 8, "backward", 9.0) == [[""] * 4] * 2


def test_few_steps_count_with_the_next(run_ranks: Callable) -> None:
    """A line for every step says nothing of a rank before the sixth, and names one at the twelfth."""
    lines, other = run_ranks(2, _run, 14, 1, "data", 20.0)
    assert lines == other
    named = [number for number, line in enumerate(lines) if line]
    assert named == [12]  # the first step of a stage does not count


def _alone() -> tuple[int, str]:
    work = OwnWork(CPU, 0.75)
    work.start()
    work.reached()
    return len(work.report()), work.slow(work.report().tolist())


def _switched_off() -> int:
    work = OwnWork(CPU, 0.0)
    work.start()
    work.reached()
    work.start()
    return len(work.report())


def test_one_rank_and_a_ratio_of_zero_measure_nothing(run_ranks: Callable) -> None:
    assert _alone() == (0, "")
    assert run_ranks(2, _switched_off) == [0, 0]


def told(*works: tuple[float, float]) -> list[float]:
    """What the all-reduce gives for ranks of a mean and a deviation over 20 steps."""
    sums = [[20.0, 20 * mean, 20 * (mean**2 + deviation**2)] for mean, deviation in works]
    return [x / len(works) for row in sums for x in row]


@pytest.mark.parametrize(
    ("works", "named"),
    [
        ([(0.1, 0.01), (0.2, 0.01)], [1]),
        ([(0.1, 0.01), (0.12, 0.01)], []),  # 0.83 of the other's speed
        ([(0.1, 0.01), (0.14, 0.01)], [1]),  # 0.71
        ([(0.1, 0.01), (0.2, 0.2)], []),  # not certain
        ([(0.1, 0.2), (0.2, 0.01)], []),
        ([(0.0001, 0.0), (0.0004, 0.0)], []),  # nobody cares
        ([(0.1, 0.01), (0.5, 0.01), (0.1, 0.01), (0.5, 0.01), (0.1, 0.01)], [1, 3]),
        ([(0.1, 0.01)] * 8, []),
    ],
)
def test_the_rule(works: list[tuple[float, float]], named: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reid_dist.slow_ranks.world_size", lambda: len(works))
    judge = OwnWork(CPU, 0.75)
    equal = told(*[(0.1, 0.01)] * len(works))
    assert judge.slow(told(*works)) == ""  # once is no habit
    line = judge.slow(told(*works))
    assert [int(part.split()[0]) for part in line.split("rank ")[1:]] == named
    assert judge.slow(equal) == "" and judge.slow(told(*works)) == ""


def _waited() -> list[float]:
    found = []
    for call in (all_gather, sum_over_ranks, lambda x: all_to_all(x.expand(world_size())), _packed):
        waits: list[tuple[Moment, Moment]] = []
        dist.barrier()
        note_waits(waits)
        time.sleep(0.05 * rank())
        call(torch.zeros(1))
        note_waits(None)
        call(torch.zeros(1))
        assert len(waits) == 1
        found.append(waits[0][1].seconds_since(waits[0][0]))
    return found


def _packed(x: torch.Tensor) -> None:
    start_all_gather([x]).wait()


def test_the_time_in_each_collective_is_noted_while_wanted(run_ranks: Callable) -> None:
    early, late = run_ranks(2, _waited)
    assert min(early) > 0.04 and max(late) < 0.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_moment_is_when_its_stream_gets_there() -> None:
    device = torch.device("cuda")
    x = torch.ones(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    began, host = Moment(device), time.perf_counter()
    for _ in range(50):
        x @ x
    end = Moment(device)
    launched = time.perf_counter() - host
    torch.cuda.synchronize()
    took = time.perf_counter() - host
    assert launched < 0.5 * took
    assert end.seconds_since(began) == pytest.approx(took, rel=0.3)
