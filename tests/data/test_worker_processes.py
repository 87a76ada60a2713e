"""Batches from worker processes: in order, and no process is left or waited for."""

import gc
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess

import pytest
from torch.utils.data import Dataset

from reid_dist.data.worker_processes import from_workers
from reid_dist.errors import UserError


class Squares(Dataset[int]):
    def __getitem__(self, number: int) -> int:
        return number**2


class Killed(Dataset[int]):
    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


@pytest.fixture
def started() -> list[BaseProcess]:
    """Processes that other tests left."""
    return multiprocessing.active_children()


def new_processes(started: list[BaseProcess]) -> list[BaseProcess]:
    return [process for process in multiprocessing.active_children() if process not in started]


def test_order(started: list[BaseProcess]) -> None:
    assert list(from_workers(Squares(), range(7), 2, False, "")) == [n**2 for n in range(7)]
    assert new_processes(started) == []


def test_what_is_given_up_in_a_cycle_is_not_waited_for(started: list[BaseProcess]) -> None:
    """As an error's traceback holds it: the collector finds loader and queues together, and torch waits 5 s each."""
    made = from_workers(Squares(), range(1000), 2, False, "")
    assert next(made) == 0
    processes = new_processes(started)
    cycle = [made]
    cycle.append(cycle)  # type: ignore[arg-type]
    del made, cycle
    assert len(processes) == 2 and all(process.is_alive() for process in processes)
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 4
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_killed_worker_is_named(started: list[BaseProcess]) -> None:
    with pytest.raises(UserError, match=r"data\.workers: a process .* ended .*: use fewer"):
        next(from_workers(Killed(), range(9), 1, False, "use fewer"))
    gc.collect()
    assert new_processes(started) == []


def test_workers_keep_the_handler_of_a_process_that_finishes_its_step_first(started: list[BaseProcess]) -> None:
    """Schedulers tell the whole group to end; torch's own handler would obey in the workers."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        made = from_workers(Squares(), range(50), 2, False, "")
        found = [next(made), next(made)]  # both have begun
        for process in new_processes(started):
            os.kill(process.pid or 0, signal.SIGTERM)
        assert [*found, *made] == [n**2 for n in range(50)]
    finally:
        signal.signal(signal.SIGTERM, before)
