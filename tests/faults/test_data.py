"""Shards that are damaged while a run trains."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.rig import Fault, Run, assert_clean, assert_same


def own_world(reference: Run, folder: Path) -> Path:
    shutil.copytree(reference.world, folder)
    return folder


def cut(world: Path, name: str, step: int, share: float = 0.55) -> list[Fault]:
    """Every tar of a set loses its end, between two steps, where open files see it too; streamed ones before them."""
    place = {"stage": "i2i", "step": step, "phase": "data"}
    if name == "generic":  # so small that they are read whole at once
        place = {"stage": "pretrain", "phase": "stage"}
    fault = {"rank": 0, **place, "kind": "cut_file", "share": share}
    return [{**fault, "path": str(tar)} for tar in sorted((world / name).glob("*.tar"))]


def flip_images(folder: Path) -> None:
    """One bit of every fifth picture."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            pictures = [member for member in tar if member.name.endswith((".jpg", ".png"))]
        data = bytearray(path.read_bytes())
        for picture in pictures[::5]:
            data[picture.offset_data + picture.size // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.fault("damaged shard")
@pytest.mark.parametrize("name", ["cuhk_pedes", pytest.param("generic", marks=pytest.mark.every)])
def test_fail_fast(reference: Run, new_run: Callable[..., Run], tmp_path: Path, name: str) -> None:
    """Without leave the first sample that cannot be read ends the run; mended, it goes on as planned."""
    # No save in between: what was replaced before the end stays so in what was saved.
    run = new_run("data.max_bad_fraction=0.05", "checkpoint.every=0")
    run.world = own_world(reference, tmp_path / "world")
    faults = cut(run.world, name, 1, 0.2)
    before = {Path(fault["path"]): Path(fault["path"]).read_bytes() for fault in faults}
    ended = run.fork(faults=faults)
    assert ExitCode.WRONG_INPUT in ended.codes, ended
    assert set(ended.codes) <= {ExitCode.WRONG_INPUT, ExitCode.LOST_PEER}, ended
    lines = [line for line in ended.said if "another rank ended" not in line]
    assert 1 <= len(lines) <= 2 and all(any(path.name in line for path in before) for line in lines), ended
    for path, data in before.items():
        path.write_bytes(data)
    again = run.fork()
    assert again.codes == [0, 0], again
    assert_clean(run, ended, again)
    assert_same(run, reference)


@pytest.mark.every
@pytest.mark.fault("damaged shard")
@pytest.mark.parametrize("name", ["cuhk_pedes", "generic"])
def test_tolerant(reference: Run, new_run: Callable[..., Run], tmp_path: Path, name: str) -> None:
    """With leave they are counted and replaced, all ranks make the same steps, and a kill changes nothing."""
    run = new_run("data.max_bad_fraction=0.9")
    run.world = own_world(reference, tmp_path / "world")
    flip_images(run.world / name)
    whole = Run(run.folder.with_name("whole"), run.world, [*run.overrides, "checkpoint.every=1"])
    first = whole.fork()
    assert first.codes == [0, 0] and "bad samples replaced" in first.out, first
    stage = "pretrain" if name == "generic" else "i2i"
    ended = run.fork(faults=[{"rank": 0, "stage": stage, "step": 4, "phase": "step", "kind": "kill"}])
    assert sorted(ended.codes) == [-9, ExitCode.LOST_PEER], ended
    again = run.fork()
    assert again.codes == [0, 0], again
    assert_clean(run, ended, again)
    assert_same(run, whole)


@pytest.mark.every
@pytest.mark.fault("damaged shard")
def test_too_many(reference: Run, new_run: Callable[..., Run], tmp_path: Path) -> None:
    """So many that no image of an identity is left to stand for another: a line of each rank that meets it."""
    run = new_run("data.max_bad_fraction=0.01")
    run.world = own_world(reference, tmp_path / "world")
    ended = run.fork(faults=cut(run.world, "cuhk_pedes", 2, 0.1))
    assert ExitCode.WRONG_INPUT in ended.codes, ended
    lines = [line for line in ended.said if "another rank ended" not in line]
    assert lines, ended
    for line in lines:
        assert "cuhk_pedes-000000.tar" in line and "samples that could stand for it are bad as well" in line, ended
