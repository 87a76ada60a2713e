"""Ranks that stand still, skip what others wait for, drift, run out of memory, are slow, or whose clock is wrong."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.rig import Fault, Run, assert_clean, assert_resumes, assert_same

HANG_S = 5
HANG = f"supervision.hang_s={HANG_S}"


def fault(kind: str, phase: str, rank: int = 1, step: int = 5, **more: object) -> Fault:
    return {"rank": rank, "stage": "i2i", "step": step, "phase": phase, "kind": kind, **more}


def assert_hung(run: Run, rank: int, ended_s: float, codes: list[int], said: list[str]) -> None:
    assert ended_s <= HANG_S + 5
    (line,) = [line for line in said if "no progress for" in line]
    assert f"rank {rank} (" in line or (rank == 0 and "rank 0, which keeps the heartbeats" in line), line
    assert "step 5" in line, line
    assert list((run.output / "hang").glob("rank-*.txt"))


@pytest.mark.fault("hung rank")
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.every)])
def test_stopped(reference: Run, new_run: Callable[..., Run], rank: int) -> None:
    """SIGSTOP: the others end by themselves and name it; whoever started the run ends it."""
    run = new_run(HANG)
    mark = run.folder / "reached"
    started = run.start(faults=[fault("stop", "gather", rank, mark=str(mark))])
    _await(mark)
    began = time.monotonic()
    other = started.pids[1 - rank]
    code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
    seconds = time.monotonic() - began
    os.kill(started.pids[rank], signal.SIGKILL)
    os.waitpid(started.pids[rank], 0)
    err = "".join(Path(f"{said}.err").read_text() for said in started.said)
    assert code == ExitCode.HUNG, err
    assert_hung(run, rank, seconds, [code], err.splitlines())
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{started.port}_*"):
        file.unlink()  # the killed rank's: under a launcher `supervise.py` removes it
    assert_resumes(run, reference)


@pytest.mark.every
@pytest.mark.fault("skipped collective")
@pytest.mark.parametrize("rank", [0, 1])
def test_skipped_save(reference: Run, new_run: Callable[..., Run], rank: int) -> None:
    """One rank goes on without; the next save tells that it stands elsewhere, and nothing of two steps is written."""
    run = new_run(HANG)
    ended = run.fork(faults=[fault("skip", "save", rank, 6)])
    assert ended.codes[1 - rank] == ExitCode.NO_CHECKPOINT and ended.seconds <= 5, ended
    assert ended.codes[rank] in (ExitCode.NO_CHECKPOINT, ExitCode.LOST_PEER), ended
    where = sorted([(6, 1 - rank), (9, rank)])
    stand = ", ".join(f"rank {each} at {step}" for step, each in where)
    assert f"i2i/checkpoints: nothing saved, the ranks stand at different steps: {stand}" in ended.out, ended
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.fault("skipped collective")
def test_skipped_gather(reference: Run, new_run: Callable[..., Run]) -> None:
    """What follows has another size: gloo ends that rank by SIGABRT, or both wait; the run ends in time either way."""
    run = new_run(HANG)
    ended = run.fork(faults=[fault("skip", "gather")])
    assert set(ended.codes) <= {-signal.SIGABRT, ExitCode.HUNG, ExitCode.LOST_PEER}, ended
    assert ended.seconds <= 5, ended
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ended.port}_*"):
        file.unlink()  # of a rank that was aborted
    assert_resumes(run, reference, ended)


@pytest.mark.fault("desync")
@pytest.mark.parametrize("phase", ["after_step"])
def test_desync(reference: Run, new_run: Callable[..., Run], phase: str) -> None:
    run = new_run("supervision.desync_every=1")
    ended = run.fork(faults=[fault("desync", phase, name="encoder.logit_scale")])
    assert ended.codes == [ExitCode.DIVERGED] * 2, ended
    (line,) = ended.said
    assert line.startswith("train.py: step 6: not the same on all ranks: encoder.logit_scale: two ranks differ"), ended
    assert_resumes(run, reference, ended)


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.every)])
def test_out_of_memory(reference: Run, new_run: Callable[..., Run], rank: int) -> None:
    run = new_run()
    ended = run.fork(faults=[fault("limit_memory", "data", rank, bytes=1 << 20)])
    assert ended.codes[rank] == ExitCode.OUT_OF_MEMORY, ended
    assert ended.codes[1 - rank] == ExitCode.LOST_PEER, ended
    (line,) = [line for line in ended.said if "another rank ended" not in line]
    assert f"rank {rank}" in line and "step 6" in line and "memory" in line, ended
    assert_resumes(run, reference, ended)


@pytest.mark.every
@pytest.mark.fault("clock skew")
@pytest.mark.parametrize("seconds", [86400.0, -3600.0])
def test_clock(reference: Run, new_run: Callable[..., Run], seconds: float) -> None:
    """One rank's clock leaps: nothing changes, before a kill and after it."""
    run = new_run(HANG)
    kill = {"rank": 0, "stage": "i2i", "step": 8, "phase": "backward", "kind": "kill"}
    ended = run.fork(faults=[fault("shift_clock", "data", step=2, seconds=seconds), kill])
    assert sorted(ended.codes) == [-9, ExitCode.LOST_PEER], ended
    again = run.fork(faults=[{"rank": 1, "phase": "begin", "kind": "shift_clock", "seconds": -seconds}])
    assert again.codes == [0, 0], again
    assert "clock" in again.out, again
    assert_clean(run, ended, again)
    assert_same(run, reference)


@pytest.mark.every
@pytest.mark.fault("slow rank")
def test_slow(new_run: Callable[..., Run]) -> None:
    """Named within two lines of the log, and the losses stay."""
    run = new_run("log_every=10", "stages.pretrain.steps=0", "stages.i2i.steps=40")
    slow = [fault("sleep", "forward", step=step, seconds=0.3) for step in range(40)]
    ended = run.fork(faults=slow)
    assert ended.codes == [0, 0], ended
    assert "rank 1 is slow" in ended.out and "rank 0 is slow" not in ended.out, ended


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(options)`: a tmpfs of its own, mounted or mounted anew."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fault("disk full")
@pytest.mark.parametrize(
    ("size", "seen"),
    [
        (3000, True),
        *(pytest.param(size, True, marks=pytest.mark.every) for size in (300, 1500, 2200, 4000)),
        *(pytest.param(size, False, marks=pytest.mark.every) for size in range(100, 2600, 300)),
    ],
)
def test_disk_full(
    reference: Run, new_run: Callable[..., Run], disk: Callable[[str], Path], size: int, seen: bool
) -> None:
    """kB of disk. Hidden: more seems free than may be written, as under a quota."""
    run = new_run()
    run.folder.mkdir()
    (run.folder / "run").symlink_to(disk(f"size={size}k"))
    hide = [] if seen else [{"phase": "begin", "kind": "hide_full_disk"}]
    ended = run.fork(faults=hide)
    # A ledger is each rank's own: the others hear that it ended.
    assert ExitCode.NO_CHECKPOINT in ended.codes, ended
    assert set(ended.codes) <= {ExitCode.NO_CHECKPOINT, ExitCode.LOST_PEER}, ended
    (line,) = [line for line in ended.said if "another rank ended" not in line]
    assert "make room, or choose another output_dir" in line and "Traceback" not in ended.err, ended
    disk("size=64m")
    assert_resumes(run, reference, ended)


@pytest.mark.fault("read-only folder")
def test_read_only(reference: Run, new_run: Callable[..., Run], disk: Callable[[str], Path]) -> None:
    """Refused before anything is built, in one line."""
    run = new_run()
    run.folder.mkdir()
    (run.folder / "run").symlink_to(disk("size=64m,ro"))
    ended = run.fork()
    assert set(ended.codes) <= {ExitCode.NO_CHECKPOINT, ExitCode.WRONG_INPUT}, ended
    assert len(set(ended.said)) == 1 and "Read-only file system" in ended.said[0], ended
    assert "steps of" not in ended.out and "Traceback" not in ended.err, ended


def _await(mark: Path) -> None:
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < deadline, "the run did not come to its fault"
        time.sleep(0.05)
