"""`launch/slurm/shard.sbatch` under a real SLURM: an array gives the same bytes as one plain process."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from shards.world.export import export
from shards.world.spec import LEVELS, ExportSpec, World

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/slurm/shard.sbatch"
EXPORTS = {"cuhk_pedes": (20, 8, 2), "img2dataset": (160, 0, 0)}
# Such that each task of an array has many shards.
SHARD_MB = {"cuhk_pedes": "0.003", "img2dataset": "0.003"}
TASKS = 4


@pytest.fixture(scope="module", params=sorted(EXPORTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def arguments(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the writer: a tiny tree of the procedural world in the format of a converter."""
    root = tmp_path_factory.mktemp("raw with space") / name
    level = LEVELS["quickstart"]
    world = World(5, level["hardness"], int(level["siblings"]), level["coverage"], level["wrong"])
    export(ExportSpec(name, world, *EXPORTS[name], 6, 0.4), root)
    return [name, "--root", str(root), "--shard-mb", SHARD_MB[name]]


@pytest.fixture(scope="module")
def plain(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the set that one process writes without SLURM."""
    out = tmp_path_factory.mktemp("plain") / "set"
    command = [sys.executable, "-m", "shards.write", *arguments, "--out", str(out), "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return _digests(out)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, which includes any that should not be there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _submit(slurm: Any, tmp_path: Path, *arguments: str, array: str = f"1-{TASKS}") -> str:
    """Job of the command in docs/shards.md; with the processors that nodes of the test cluster have."""
    options = ("--cpus-per-task=1", f"--output={tmp_path}/%A_%a.log")
    return str(slurm.submit(*options, f"--array={array}", SCRIPT, *arguments, cwd=ROOT))


def _log(tmp_path: Path, job: str, task: int) -> str:
    return (tmp_path / f"{job}_{task}.log").read_text()


def _ends(tasks: dict[str, dict[str, str]]) -> dict[str, tuple[str, str]]:
    return {task: (fields["JobState"], fields["ExitCode"]) for task, fields in tasks.items()}


def _process(job: str, task: int) -> int | None:
    """Number of the writer's process of an array task, once it runs."""
    marks = {f"SLURM_ARRAY_JOB_ID={job}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            writes = b"shards.write" in (folder / "cmdline").read_bytes()
            if writes and marks <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
        except OSError:  # It has ended, or it is somebody else's.
            continue
    return None


def _stop_in_the_middle(job: str, tasks: Iterable[int], out: Path) -> dict[int, int]:
    """Processes of array tasks, stopped after the first shards of theirs and before the last."""
    deadline = time.monotonic() + 60
    running: dict[int, int | None] = dict.fromkeys(tasks)
    stopped: dict[int, int] = {}
    while len(stopped) < len(running):
        assert time.monotonic() < deadline, f"only {list(stopped)} of {list(running)} wrote a shard"
        for task in running.keys() - stopped.keys():
            process = running[task] = running[task] or _process(job, task)
            if process and any(_shards_there(out, task)):
                os.kill(process, signal.SIGSTOP)
                stopped[task] = process
    for task in stopped:
        assert not all(_shards_there(out, task)), f"task {task} was too fast to be stopped"
    return stopped


def _shards_there(out: Path, task: int) -> list[bool]:
    names = json.loads((out / "build.json").read_text())["names"] if (out / "build.json").exists() else []
    # A tar without its part would be written again.
    return [(out / "partial" / f"{name}.json").exists() for name in names[task - 1 :: TASKS]]


WELL = {str(task): ("COMPLETED", "0:0") for task in range(1, TASKS + 1)}


def test_array_gives_the_bytes_of_one_process(
    slurm: Any, arguments: list[str], plain: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    job = _submit(slurm, tmp_path, *arguments, "--out", str(out))
    ends = _ends(slurm.wait(job))
    logs = [_log(tmp_path, job, task) for task in range(1, TASKS + 1)]
    assert ends == WELL, logs
    assert _digests(out) == plain
    assert {"index.npy", "manifest.json"} < plain.keys() and len(list(out.glob("*.tar"))) >= 4 * TASKS
    manifest = json.loads((out / "manifest.json").read_text())
    assert any(f"in {len(manifest['shards'])} shards" in log for log in logs), "no task merged"


def test_tasks_that_were_ended_are_continued(
    slurm: Any, arguments: list[str], plain: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    job = _submit(slurm, tmp_path, *arguments, "--out", str(out))
    stopped = _stop_in_the_middle(job, (2, 3, 4), out)
    os.kill(stopped[2], signal.SIGKILL)
    slurm.run("scancel", f"{job}_3")
    # As a preemption does; the task starts again by itself.
    slurm.run("scontrol", "requeue", f"{job}_4")
    ends = _ends(slurm.wait(job))
    assert ends["1"] == ends["4"] == WELL["1"], ends
    assert ends["2"] == ("FAILED", "0:9") and ends["3"][0] == "CANCELLED", ends
    requeued = _log(tmp_path, job, 4)
    assert "continuing" in requeued.partition("keeps the finished shards")[2], requeued
    assert "keeps the finished shards" in _log(tmp_path, job, 3)
    assert not (out / "manifest.json").exists()
    finished = {out / part.stem: (out / part.stem).stat().st_mtime_ns for part in (out / "partial").glob("*.json")}
    again = _submit(slurm, tmp_path, *arguments, "--out", str(out))
    assert _ends(slurm.wait(again)) == WELL
    assert "continuing" in _log(tmp_path, again, 2) and "continuing" in _log(tmp_path, again, 3)
    assert _digests(out) == plain
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.parametrize(
    ("array", "first", "line"),
    [
        ("1", ("--root", "RAW"), "name a data set"),
        ("1,3", ("img2dataset", "--root", "RAW"), "--array needs numbers without gaps, such as 1-2;"),
        ("1", ("no_such_set", "--root", "RAW"), "no such converter"),
        ("1", ("img2dataset", "--root", "no such folder"), "--root no such folder: no such folder"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(
    array: str, first: tuple[str, ...], line: str, slurm: Any, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    job = _submit(slurm, tmp_path, *first, "--out", str(out), array=array)
    tasks = slurm.wait(job)
    assert set(_ends(tasks).values()) == {("FAILED", "2:0")}
    for task in tasks:
        log = _log(tmp_path, job, int(task))
        assert line in log and log.count("\n") == 1, log
    assert not out.exists()
