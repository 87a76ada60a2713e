"""Signals to ranks and to `launch/supervise.py`: saved at one step, ended with 75, gone on with as if nothing was."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.rig import Fault, Run, assert_clean, assert_resumes, assert_same, saves


def to_self(rank: int, number: int, phase: str = "forward", step: int = 4, **more: object) -> Fault:
    return {"rank": rank, "stage": "i2i", "step": step, "phase": phase, "kind": "signal", "number": number, **more}


@pytest.mark.fault("SIGUSR1 to a rank")
def test_usr1_to_one_rank(reference: Run, new_run: Callable[..., Run]) -> None:
    run = new_run()
    ended = run.fork(faults=[to_self(0, signal.SIGUSR1)])
    assert ended.codes == [ExitCode.STOPPED] * 2, ended
    (line,) = ended.said
    assert line.startswith("train.py: SIGUSR1: saved after step "), ended
    assert int(line.split("step ")[1].split(";")[0]) in (5, 6, 7)
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.fault("SIGTERM to a rank")
@pytest.mark.parametrize("phase", ["data", "gather", "step", "update"])
def test_term_to_one_rank(reference: Run, new_run: Callable[..., Run], phase: str) -> None:
    run = new_run("data.workers=1")
    ended = run.fork(faults=[to_self(1, signal.SIGTERM, phase)])
    assert ended.codes == [ExitCode.STOPPED] * 2 and len(ended.said) == 1, ended
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.fault("signal during a save")
def test_term_in_a_save(reference: Run, new_run: Callable[..., Run]) -> None:
    run = new_run()
    ended = run.fork(faults=[to_self(0, signal.SIGTERM, "rename", 6)])
    assert ended.codes == [ExitCode.STOPPED] * 2 and len(ended.said) == 1, ended
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.fault("SIGTERM to a rank")
def test_term_again_and_again(reference: Run, new_run: Callable[..., Run]) -> None:
    """A chain of time limits: each start makes a few steps."""
    run, ended = new_run(), []
    for step in range(1, 12, 3):
        ended.append(run.fork(faults=[to_self(step % 2, signal.SIGTERM, "data", step)]))
        assert ended[-1].codes == [ExitCode.STOPPED] * 2, ended[-1]
    assert_resumes(run, reference, *ended)


@pytest.mark.fault("double signal")
def test_two_signals(reference: Run, new_run: Callable[..., Run]) -> None:
    """The second ends the rank at once; the last checkpoint stands."""
    run = new_run()
    twice = {**to_self(1, signal.SIGTERM, "gather", 4), "kind": "twice"}
    ended = run.fork(faults=[twice])
    assert ended.codes[1] == 128 + signal.SIGTERM and ended.codes[0] in (70, 75, 143), ended
    assert sum("SIGTERM after SIGTERM: ends at once, without saving" in line for line in ended.said) == 1, ended
    assert ended.seconds <= 5, ended
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.fault(f"{number.name} to the launcher"), id=number.name)
        for number in (signal.SIGTERM, signal.SIGUSR1)
    ],
)
def test_told_through_the_supervisor(reference: Run, new_run: Callable[..., Run], number: signal.Signals) -> None:
    run = new_run()
    mark = run.folder / "reached"
    note = {"rank": 1, "stage": "i2i", "step": 4, "phase": "data", "kind": "sleep", "seconds": 1, "mark": str(mark)}
    started = run.launch(faults=[note], supervise=["--grace", "30"])
    _await(mark, started.process.poll)
    began = time.monotonic()
    os.kill(started.process.pid, number)
    ended = started.wait()
    assert ended.codes == [ExitCode.STOPPED], ended
    assert time.monotonic() - began <= 20
    assert sum(f"{number.name}: saved after step " in line for line in ended.said) == 1, ended
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.fault("double signal")
def test_two_signals_to_the_supervisor(reference: Run, new_run: Callable[..., Run]) -> None:
    run = new_run()
    mark = run.folder / "reached"
    sleep = {"rank": 1, "stage": "i2i", "step": 4, "phase": "data", "kind": "sleep", "seconds": 25, "mark": str(mark)}
    started = run.launch(faults=[sleep], supervise=["--grace", "60"])
    _await(mark, started.process.poll)
    began = time.monotonic()
    for _ in range(2):
        os.kill(started.process.pid, signal.SIGTERM)
        time.sleep(1.5)
    ended = started.wait()
    assert ended.codes == [128 + signal.SIGTERM], ended
    assert time.monotonic() - began <= 15
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.kill
@pytest.mark.fault("restart by the supervisor")
def test_killed_under_the_supervisor(reference: Run, new_run: Callable[..., Run]) -> None:
    """It starts again by itself; each start meets the kill at its own step."""
    run = new_run()
    faults = [
        {"rank": 0, "stage": "i2i", "step": 5, "phase": "step", "kind": "kill", "unless": str(run.folder / "met")}
    ]
    ended = run.launch(faults=faults, supervise=["--restarts", "2", "--grace", "30"]).wait()
    assert ended.codes == [0], ended
    assert sum("starts again" in line for line in ended.said) == 1, ended
    assert_clean(run, ended)
    assert_same(run, reference)
    assert saves(run)


def _await(mark: Path, ended: Callable[[], int | None]) -> None:
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert ended() is None and time.monotonic() < deadline, "the run ended before its fault"
        time.sleep(0.05)
