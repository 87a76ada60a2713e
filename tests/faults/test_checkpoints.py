"""Checkpoints that are damaged: refused in one line before any step; with --fallback the one before is taken up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.rig import Ended, Run, assert_clean, assert_same

NEW, OLD = "step-00000009", "step-00000006"
TENSORS = "rank-00001-of-00002.safetensors"


def cut(folder: Path) -> Path:
    path = folder / NEW / TENSORS
    path.write_bytes(path.read_bytes()[: int(0.55 * path.stat().st_size)])
    return path


def flip(folder: Path) -> Path:
    return _flip(folder / NEW / TENSORS, 0.7)


def flip_values(folder: Path) -> Path:
    return _flip(folder / NEW / TENSORS.replace("safetensors", "json"), 0.5)


def flip_manifest(folder: Path) -> Path:
    return _flip(folder / NEW / "manifest.json", 0.3)


def delete(folder: Path) -> Path:
    (folder / NEW / TENSORS).unlink()
    return folder / NEW / TENSORS


def swap(folder: Path) -> Path:
    first, second = (folder / NEW / f"rank-0000{rank}-of-00002.safetensors" for rank in range(2))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return first


def mix(folder: Path) -> Path:
    shutil.copy(folder / OLD / TENSORS, folder / NEW / TENSORS)
    return folder / NEW / TENSORS


def empty_latest(folder: Path) -> Path:
    (folder / "latest").write_text("")
    return folder / "latest"


def missing_latest_target(folder: Path) -> Path:
    (folder / "latest").write_text("step-00000012\n")
    return folder / "latest"


def lose_manifest(folder: Path) -> Path:
    (folder / NEW / "manifest.json").unlink()
    return folder / "latest"


def _flip(path: Path, place: float) -> Path:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    return path


CHEAP = [cut, flip, delete, empty_latest]
OTHERS = [flip_values, flip_manifest, swap, mix, missing_latest_target, lose_manifest]


@pytest.fixture(scope="module")
def stopped(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Killed after the saves of steps 6 and 9 of the second stage."""
    run = Run(tmp_path_factory.mktemp("stopped"), reference.world)
    ended = run.fork(
        "checkpoint.asynchronous=false",
        faults=[{"rank": 1, "stage": "i2i", "step": 11, "phase": "step", "kind": "kill"}],
    )
    assert sorted(ended.codes) == [-9, ExitCode.LOST_PEER], ended
    shutil.rmtree(run.output / "i2i/checkpoints" / ".step-00000012.reid_dist-partial", ignore_errors=True)
    names = sorted(path.name for path in (run.output / "i2i/checkpoints").iterdir())
    assert names == ["latest", OLD, NEW]
    return run


def copy_of(stopped: Run, folder: Path) -> Run:
    shutil.copytree(stopped.folder, folder)
    return Run(folder, stopped.world)


def refused(run: Run, *more: str) -> Ended:
    """Both ranks end with 2 and rank 0 says why, in one line, before any step."""
    before = _ledgers(run)
    ended = run.fork(*more)
    assert ended.codes == [ExitCode.WRONG_INPUT] * 2, ended
    assert len(set(ended.said)) == 1 and "Traceback" not in ended.err, ended
    assert _ledgers(run) == before
    return ended


def _ledgers(run: Run) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(run.output.rglob("rank-*.jsonl"))}


@pytest.mark.fault("damaged checkpoint")
@pytest.mark.parametrize("damage", [*CHEAP, *(pytest.param(each, marks=pytest.mark.every) for each in OTHERS)])
def test_damage_is_refused(stopped: Run, tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    run = copy_of(stopped, tmp_path / "run")
    path = damage(run.output / "i2i/checkpoints")
    ended = refused(run, "--resume", "auto")
    assert str(path) in ended.said[0] and "--fallback" in ended.said[0], ended


@pytest.mark.fault("fallback to an earlier checkpoint")
@pytest.mark.parametrize("damage", [flip, *(pytest.param(x, marks=pytest.mark.every) for x in (*CHEAP, *OTHERS))])
def test_fallback(reference: Run, stopped: Run, tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    run = copy_of(stopped, tmp_path / "run")
    damage(run.output / "i2i/checkpoints")
    ended = run.fork("--fallback")
    assert ended.codes == [0, 0], ended
    if damage not in (empty_latest, missing_latest_target):
        assert f"i2i: goes on after step 6, from {run.output}/i2i/checkpoints/{OLD}" in ended.out, ended
    assert_clean(run, ended)
    assert_same(run, reference)


@pytest.mark.fault("wrong --resume")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "never"], "--resume never: "),
        (["--resume", "{run}/i2i/checkpoints/step-00000042"], "no "),
        pytest.param(["--resume", "must", "output_dir={run}/other"], "--resume must: ", marks=pytest.mark.every),
        pytest.param(["optimizer.lr=0.002"], "made from other settings or data", marks=pytest.mark.every),
        pytest.param(["--resume", "{run}"], "", marks=pytest.mark.every),
    ],
)
def test_wrong_resume(stopped: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    run = copy_of(stopped, tmp_path / "run")
    ended = refused(run, *(each.format(run=run.output) for each in arguments))
    assert words in ended.said[0], ended


@pytest.mark.every
@pytest.mark.fault("wrong --resume")
def test_resume_by_name(reference: Run, stopped: Run, tmp_path: Path) -> None:
    """From an earlier checkpoint; the later one goes, and the ledger forgets its steps."""
    run = copy_of(stopped, tmp_path / "run")
    ended = run.fork("--resume", str(run.output / "i2i/checkpoints" / OLD))
    assert ended.codes == [0, 0] and "i2i: goes on after step 6" in ended.out, ended
    assert_same(run, reference)


@pytest.mark.every
@pytest.mark.fault("wrong --resume")
def test_resume_from_another_stage(stopped: Run, reference: Run, tmp_path: Path) -> None:
    run = copy_of(stopped, tmp_path / "run")
    shutil.rmtree(run.output / "i2i")
    other = tmp_path / "saved"
    shutil.copytree(stopped.output / "i2i/checkpoints" / OLD, other / OLD)
    shutil.rmtree(run.output / "pretrain")
    ended = refused(run, "--resume", str(other / OLD))
    assert "made by stage i2i" in ended.said[0], ended


@pytest.mark.every
@pytest.mark.fault("clock skew")
def test_order_is_by_step(reference: Run, stopped: Run, tmp_path: Path) -> None:
    """The older checkpoint is newer by the clock of the file system."""
    import os

    run = copy_of(stopped, tmp_path / "run")
    folder = run.output / "i2i/checkpoints"
    (folder / "latest").unlink()
    for path in (*(folder / NEW).iterdir(), folder / NEW):
        os.utime(path, (1, 1))
    ended = run.fork()
    assert ended.codes == [0, 0] and "i2i: goes on after step 9" in ended.out, ended
    assert json.loads((folder.parent / "training.json").read_text())
    assert_same(run, reference)
