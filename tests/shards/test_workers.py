"""Jobs in processes: all results, clear errors, no process left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards.workers import Interrupted, Progress, run_jobs, signals_raise


def _square(job: int, progress: Progress) -> tuple[int, int]:
    for _ in range(job):
        progress(1)
    return job * job, os.getpid()


def _fail(job: int, progress: Progress) -> int:
    if job == 3:
        raise UserError("3.jpg: is bad")
    if job == 4:
        raise OSError(28, "No space left on device")
    if job == 5:
        raise ValueError("a bug")
    if job == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_results_and_all_progress(workers: int) -> None:
    done: list[int] = []
    jobs = iter(range(20))
    results = list(run_jobs(_square, jobs, workers, done.append))
    assert sorted(result for result, _ in results) == [job * job for job in range(20)]
    assert sum(done) == sum(range(20))
    assert (os.getpid() in {pid for _, pid in results}) == (workers < 2)
    assert not active_children()


def test_more_workers_than_jobs_and_none() -> None:
    assert [result for result, _ in run_jobs(_square, [5], 3, lambda units: None)] == [25]
    assert not list(run_jobs(_square, [], 2, lambda units: None))


@pytest.mark.parametrize(
    ("job", "kind", "message"),
    [
        (3, UserError, "3.jpg: is bad"),
        (4, OSError, "No space left"),
        (5, RuntimeError, "ValueError: a bug"),
        (6, OSError, "exit code -9"),
    ],
)
def test_errors_reach_the_caller(job: int, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(run_jobs(_fail, [job], 2, lambda units: None))
    assert not active_children()


def test_closing_ends_the_processes() -> None:
    with closing(run_jobs(_square, iter(range(1_000_000)), 2, lambda units: None)) as results:
        next(results)
        assert len(active_children()) == 2
    assert not active_children()


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Also those that wait for work: the other end of their pipe closes."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from shards.workers import run_jobs\n"
        "def work(job, progress):\n"
        "    for _ in range(job):\n"
        "        time.sleep(0.05)\n"
        "        progress(1)\n"
        "    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for result in run_jobs(work, [1, 1, 400], 2, lambda units: None):\n"
        "        print(result, flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert parent.stdout is not None
    pids = {int(parent.stdout.readline()) for _ in range(2)}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not any(_running(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pids} still run")


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_signals_become_exceptions() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.getsignal(number)
        with pytest.raises(Interrupted) as caught, signals_raise():
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert caught.value.number == number and signal.getsignal(number) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
