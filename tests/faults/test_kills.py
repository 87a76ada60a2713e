"""SIGKILL of a rank or of a launcher, at every phase of a step and of a save: the next start goes on as if nothing was.

Three kills always; sixty with `bash tests/run.sh --faults`, most of forked ranks, some under the deepspeed launcher.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.rig import STEPS, Fault, Run, assert_resumes

EVERY = 3  # steps between saves, as in the recipe
IN_STEP = ("data", "forward", "collective", "backward", "step", "optimizer", "after_step", "update")
IN_SAVE = ("share", "write", "manifest", "rename", "latest", "purge", "removal")
OF_RANK_0 = ("manifest", "rename", "latest", "purge", "removal")
BETWEEN = ("stage", "export", "exported", "evaluation", "scored")


def kill(stage: str, step: int, phase: str, rank: int) -> Fault:
    return {"rank": rank, "stage": stage, "step": step, "phase": phase, "kind": "kill"}


def drawn_kills() -> list[Fault]:
    """Each phase at seeded steps, stages and ranks."""
    draw = random.Random(7)
    found = []
    for phase in (*IN_STEP, *IN_STEP, *IN_STEP[:3]):
        stage = draw.choice(list(STEPS))
        found.append(kill(stage, draw.randrange(STEPS[stage]), phase, draw.randrange(2)))
    for phase in (*IN_SAVE, *IN_SAVE):
        stage = "i2i" if phase in ("removal", "purge") else draw.choice(list(STEPS))
        # What removes old checkpoints needs three: keep is 2.
        saves = range(EVERY, STEPS[stage], EVERY) if phase != "removal" else [9]
        found.append(kill(stage, draw.choice(saves), phase, 0 if phase in OF_RANK_0 else draw.randrange(2)))
    for phase in BETWEEN:
        for stage in STEPS:
            fault = kill(stage, 0, phase, 0 if phase.startswith("export") else draw.randrange(2))
            del fault["step"]
            found.append(fault)
    return found


def name(fault: Fault) -> str:
    return f"rank {fault['rank']} {fault['stage']} {fault.get('step', '')} {fault['phase']}"


def check_forked(run: Run, reference: Run, fault: Fault) -> None:
    ended = run.fork(faults=[fault])
    assert ended.codes[fault["rank"]] == -9, ended
    # After the last scores nothing is left to do: the other rank may end well before it hears of the kill.
    last = fault["stage"] == "i2i" and fault["phase"] == "scored"
    assert ended.codes[1 - fault["rank"]] in ({ExitCode.LOST_PEER, 0} if last else {ExitCode.LOST_PEER}), ended
    assert ended.seconds <= 5, ended
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ended.port}_{fault['rank']}"):
        file.unlink()  # of the killed rank: nobody is left to do it, and `supervise.py` is not there
    lost = ended.codes[1 - fault["rank"]] == ExitCode.LOST_PEER
    assert ended.said == [f"train.py: rank {1 - fault['rank']} stops because another rank ended"] * lost, ended
    assert_resumes(run, reference, ended)


@pytest.mark.kill
@pytest.mark.fault("SIGKILL of a rank")
@pytest.mark.parametrize(
    "fault", [kill("i2i", 7, "collective", 1), kill("i2i", 9, "latest", 0)], ids=["in a collective", "in a save"]
)
def test_killed(reference: Run, new_run: Callable[..., Run], fault: Fault) -> None:
    check_forked(new_run(), reference, fault)


@pytest.mark.kill
@pytest.mark.fault("SIGKILL of the launcher")
@pytest.mark.parametrize(
    ("levels", "stage", "phase"),
    [
        (2, "pretrain", "forward"),
        *(
            pytest.param(*each, marks=pytest.mark.every)
            for each in ((1, "i2i", "optimizer"), (2, "i2i", "collective"), (1, "pretrain", "data"))
        ),
    ],
    ids=["deepspeed", "launch.py", "deepspeed in a collective", "launch.py in the data"],
)
def test_killed_launcher(reference: Run, new_run: Callable[..., Run], levels: int, stage: str, phase: str) -> None:
    """One level up is DeepSpeed's launch.py, two the `deepspeed` command: the ranks end by themselves."""
    run = new_run()
    fault = {"rank": 0, "stage": stage, "step": 4, "phase": phase, "kind": "kill_launcher", "levels": levels}
    ended = run.launch(faults=[fault]).wait()
    # `deepspeed` itself ends with 0 when its launch.py is killed; `supervise.py` asks the ranks instead.
    assert ended.codes == [-9 if levels == 2 else 0], ended
    assert_resumes(run, reference, ended)


@pytest.mark.kill
@pytest.mark.every
@pytest.mark.fault("SIGKILL of a rank")
@pytest.mark.parametrize(
    "fault",
    [
        kill("pretrain", 4, "collective", 0),
        kill("i2i", 6, "latest", 0),
        kill("i2i", 9, "write", 1),
        kill("i2i", 8, "optimizer", 1),
    ],
    ids=lambda fault: name(fault),
)
@pytest.mark.parametrize("supervised", [False, True], ids=["deepspeed", "supervised"])
def test_killed_under_a_launcher(reference: Run, new_run: Callable[..., Run], fault: Fault, supervised: bool) -> None:
    """The rest ends within 15 s of the kill, whoever started it."""
    run = new_run()
    mark = run.folder / "reached"
    started = run.launch(faults=[{**fault, "mark": str(mark)}], supervise=[] if supervised else None)
    deadline = time.monotonic() + 180
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    ended = started.wait()
    assert time.monotonic() - began <= 15 and mark.exists(), ended
    assert ended.codes[0] != 0, ended
    if supervised:
        assert ended.codes == [ExitCode.LOST_PEER], ended
    else:
        for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ended.port}_*"):
            file.unlink()  # of the killed rank; `supervise.py` removes it
    assert_resumes(run, reference, ended)


@pytest.mark.kill
@pytest.mark.every
@pytest.mark.fault("SIGKILL of a rank")
@pytest.mark.fault("kill between stages")
@pytest.mark.parametrize("fault", drawn_kills(), ids=name)
def test_killed_anywhere(reference: Run, new_run: Callable[..., Run], fault: Fault) -> None:
    workers = f"data.workers={fault.get('step', 0) % 2}"
    check_forked(new_run(workers), reference, fault)
