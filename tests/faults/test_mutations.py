"""The oracles themselves: with any one state left out of what is resumed they turn red. Prints a table."""

import shutil
from pathlib import Path

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.omissions import STATES
from tests.faults.rig import Run, assert_same, differences

pytestmark = [pytest.mark.every, pytest.mark.fault("a state left out of the checkpoint")]
KILLED_AT = {"pretrain": 3, "i2i": 8}


@pytest.fixture(scope="module")
def killed(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run that was killed in each stage, behind a save and between two lines of the log."""
    runs = {}
    for stage, step in KILLED_AT.items():
        runs[stage] = Run(tmp_path_factory.mktemp(stage), reference.world, ["log_every=5", "checkpoint.every=2"])
        kill = {"rank": 1, "stage": stage, "step": step, "phase": "backward", "kind": "kill"}
        ended = runs[stage].fork("checkpoint.asynchronous=false", faults=[kill])
        assert sorted(ended.codes) == [-9, ExitCode.LOST_PEER], ended
    return runs


@pytest.fixture(scope="module")
def whole(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `reference`, with a log whose lines do not fall on saves: its sums are then a state."""
    run = Run(tmp_path_factory.mktemp("whole"), reference.world, ["log_every=5", "checkpoint.every=1"])
    assert run.fork().codes == [0, 0]
    return run


def resumed(killed: Run, folder: Path, *omitted: str) -> tuple[Run, str]:
    shutil.copytree(killed.folder, folder)
    run = Run(folder, killed.world, killed.overrides)
    ended = run.fork(faults=[{"phase": "begin", "kind": "omit", "state": state} for state in omitted])
    assert ended.codes == [0, 0], ended
    return run, ended.out


@pytest.mark.parametrize("stage", list(KILLED_AT))
def test_nothing_left_out(whole: Run, killed: dict[str, Run], tmp_path: Path, stage: str) -> None:
    run, out = resumed(killed[stage], tmp_path / "run")
    assert_same(run, whole)
    assert "own check" not in out


@pytest.mark.parametrize("state", list(STATES))
def test_left_out(
    whole: Run, killed: dict[str, Run], tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = resumed(killed[STATES[state]], tmp_path / "run", state)
    found = differences(run, whole)
    seen = sorted({text.rpartition(": ")[2] for text in found["O2"]})
    cells = ["red" if found[oracle] else "-" for oracle in ("O1", "O2", "O3")]
    own = "stops" if "own check: " in out else "-"
    with capsys.disabled():
        print(f"\n| {state} | {own} | {' | '.join(cells)} | {', '.join(seen)[:90]} |", end="")
    assert "red" in cells, f"nobody sees that {state} is missing"
