"""What a signal means to a rank, and to the processes that it forks."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from reid_dist.supervision import signals
from reid_dist.supervision.signals import STOP_SIGNALS, StopRequest


def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hear_one(folder: Path, rank: int, number: int) -> int:
    with StopRequest(grace_s=60) as request:
        assert request.name is None
        for _ in range(3):  # a launcher's echo
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        until(lambda: request.name)
    for later in STOP_SIGNALS:
        os.kill(os.getpid(), later)  # a launcher's, which ends all with the first rank: it is ending
    return 75 if request.name == signal.Signals(number).name else 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_remembered_and_its_echoes_are_not(start: Any, number: int) -> None:
    ranks = start(1, hear_one, number)
    assert ranks.codes(30) == [75], ranks.said()


def hear_none(folder: Path, rank: int) -> int:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest(grace_s=60) as request:
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and request.name is None
    os.kill(os.getpid(), signal.SIGTERM)
    return 0


def test_without_a_signal_all_is_afterwards_as_before(start: Any) -> None:
    assert start(1, hear_none).codes(30) == [-signal.SIGTERM]


def wait_in_c(folder: Path, rank: int, grace_s: float) -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with StopRequest(grace_s):
        (folder / "ready").touch()
        store.get("what nobody sets")  # runs no Python until its end
    return 0


def test_a_second_signal_ends_a_rank_that_waits_for_others(start: Any) -> None:
    ranks = start(1, wait_in_c, 60)
    ranks.wait_for("ready")
    ranks.signal(0, signal.SIGUSR1)
    time.sleep(signals.ECHO_S + 0.3)
    ranks.signal(0, signal.SIGTERM)
    assert ranks.codes(2) == [128 + signal.SIGTERM]
    assert ranks.said() == "rank 0: SIGTERM after SIGUSR1: ends at once, without saving\n"


def test_a_rank_that_does_not_save_in_time_ends(start: Any) -> None:
    ranks = start(1, wait_in_c, 0.3)
    ranks.wait_for("ready")
    ranks.signal(0, signal.SIGTERM)
    assert ranks.codes(5) == [71]
    assert ranks.said() == "rank 0: SIGTERM, but not saved 0.3 s later: ends; the last checkpoint stands\n"


def fork_a_worker(folder: Path, rank: int) -> int:
    with StopRequest(grace_s=1) as request:
        if (worker := os.fork()) == 0:
            (folder / "worker").touch()
            time.sleep(60)
            os._exit(0)
        until((folder / "worker").exists)
        for number in STOP_SIGNALS:
            os.kill(worker, number)
            time.sleep(0.2)
        assert request.name is None  # they were the worker's
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)  # and it still reads
        _, status = os.waitpid(worker, 0)  # but SIGTERM ends it when a rank would have ended too
        return 75 if os.WTERMSIG(status) == signal.SIGALRM else 1


def test_a_worker_outlives_signals_to_all_until_its_rank_has_saved(start: Any) -> None:
    ranks = start(1, fork_a_worker)
    assert ranks.codes(30) == [75], ranks.said()
