"""Launchers that are killed take their ranks along, and these their children."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reid_dist.supervision import parents
from reid_dist.supervision.processes import Process, find
from tests.supervision.launches import CLEAN, HERE, ROOT, Launch

DEEPSPEED = ["python", "/env/bin/deepspeed", "launch/train.py"]
LAUNCH = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "launch/train.py"]
TORCHRUN = ["/env/bin/python", "/env/bin/torchrun", "launch/train.py"]
SUPERVISE = ["python", "launch/supervise.py", "--", "deepspeed"]
STEP = ["slurmstepd: [7.0]"]
SHELL, INIT = ["-bash"], ["/sbin/init"]


@pytest.mark.parametrize(
    ("chain", "watched"),
    [
        ([LAUNCH, DEEPSPEED, SHELL, INIT], 2),
        ([LAUNCH, DEEPSPEED, SUPERVISE, SHELL, INIT], 3),
        ([TORCHRUN, SHELL, INIT], 1),
        ([SHELL, TORCHRUN, SHELL, INIT], 2),  # torchrun --no-python bash run.sh
        ([STEP, INIT], 1),
        ([SHELL, ["sshd: someone"], INIT], 0),  # started by hand: it may outlive the shell
        ([INIT], 0),
    ],
)
def test_launchers_are_watched_and_shells_above_them_are_not(
    chain: list[list[str]], watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "command", lambda self: chain[self.pid])
    found = parents._launchers([Process(number, 0, number + 1) for number in range(len(chain))])
    assert [process.pid for process in found] == list(range(watched))


def test_ranks_and_their_children_end_with_a_killed_launcher(tmp_path: Path) -> None:
    """The runner, deepspeed's outer process; the inner one, the ranks' parent, would wait for them for ever."""
    with Launch("deepspeed", "idling.py", tmp_path, "fork") as launch:
        ranks, children = launch.pids(), launch.pids("child")
        launch.process.kill()
        assert launch.until_gone(*ranks, *children) <= 5
        assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text() == "SIGTERM"


def test_ranks_that_cannot_save_end_with_a_killed_launcher_all_the_same(tmp_path: Path) -> None:
    with Launch("torchrun", "idling.py", tmp_path, "deaf") as launch:
        ranks = launch.pids()
        launch.process.kill()
        assert launch.until_gone(*ranks) <= 5
        assert "its launcher has ended; ends too" in launch.end()[1]


@pytest.mark.skipif("python" in " ".join(Process(1, 0, 0).command()[:2]), reason="process 1 could be a launcher")
@pytest.mark.parametrize("mark", parents._MARKS)
def test_a_rank_whose_launcher_ended_before_it_began_ends(mark: str, tmp_path: Path) -> None:
    """A shell that is not a launcher starts it in the background and ends; what adopts it is not a Python program."""
    environment = {name: value for name, value in os.environ.items() if name not in CLEAN}
    environment |= {"PYTHONPATH": str(ROOT), mark: "1"}
    program = f"(sleep 0.3; exec '{sys.executable}' '{HERE / 'idling.py'}' '{tmp_path}') & "
    try:
        ended = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, timeout=20)
        assert "its launcher ended before it began" in ended.stderr
        assert not (tmp_path / "rank0").exists()
    finally:
        if (tmp_path / "rank0").exists():
            os.kill(int((tmp_path / "rank0").read_text()), signal.SIGKILL)


def test_a_rank_started_by_hand_outlives_its_shell(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CLEAN}
    rank = f"'{sys.executable}' '{HERE / 'idling.py'}' '{tmp_path}' >'{tmp_path}/said' 2>&1"
    program = f"{rank} & echo $!; while [ ! -e '{tmp_path}/rank0' ]; do sleep 0.05; done"
    environment |= {"PYTHONPATH": str(ROOT)}
    shell = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, timeout=20)
    process = find(int(shell.stdout))
    assert process is not None
    try:
        time.sleep(3 * parents._POLL_S)
        assert process.runs()
    finally:
        process.signal(signal.SIGKILL)
