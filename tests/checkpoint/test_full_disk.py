"""Disks that are full, or that nobody may write: one line, the last checkpoint whole, nothing left behind."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from reid_dist.checkpoint.reader import open_checkpoint
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.distributed import barrier, rank
from reid_dist.errors import CheckpointError
from tests.checkpoint import states

SIZE = 40  # stretches the state to about 130 kB
_DISK_KB = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_KB}k", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _save(folder: Path, checkpoints: CheckpointWriter, step: int) -> str:
    try:
        checkpoints.save(step, states.pieces(step, SIZE), states.private(step), states.record(step), wait=True)
    except CheckpointError as error:
        return str(error)
    return "saved"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _fill_and_save(disk: Path, rooms: list[int]) -> list[tuple[str, list[str], bool]]:
    """For each number of free kB: what came of a save, the names that are there then, whether the first is good."""
    # What quotas hide: more is free than may be written.
    os.statvfs = lambda path: SimpleNamespace(f_bavail=1 << 30, f_frsize=4096)  # type: ignore[assignment,misc]
    folder = disk / "checkpoints"
    checkpoints = states.writer(folder, keep=9)
    _save(folder, checkpoints, 1)
    found = []
    for room in rooms:
        barrier()
        if rank() == 0:
            used = int(subprocess.check_output(["df", "-k", "--output=used", disk]).split()[-1])
            (disk / "ballast").write_bytes(b"x" * (_DISK_KB - used - room) * 1024)
        barrier()
        words = _save(folder, checkpoints, 2)
        barrier()
        names = _names(folder)
        first = open_checkpoint(folder / "step-00000001")
        found.append((words, names, first.digests() == first.manifest.digests))
        barrier()
        if rank() == 0:
            (disk / "ballast").unlink()
            shutil.rmtree(folder / "step-00000002", ignore_errors=True)
            (folder / "latest").write_text("step-00000001\n")
    return found


def test_a_disk_that_is_full_at_any_size(disk: Path, run_ranks: Callable) -> None:
    rooms = [*range(0, 180, 6), 700]
    found = run_ranks(2, _fill_and_save, disk, rooms)
    assert found[0] == found[1]
    for words, names, good in found[0][:-1]:
        assert good
        if words != "saved":
            assert words.startswith("checkpoint of step 2: /") and "\n" not in words
            assert "No space left on device; make room, or choose another output_dir" in words
        # Room for the checkpoint but not for `latest`: the folder is whole already.
        assert names in (["latest", "step-00000001"], ["latest", "step-00000001", "step-00000002"])
    refused = [words for words, _, _ in found[0] if words != "saved"]
    files = {words.split(": ")[1].rpartition("/")[2] for words in refused}
    assert len(refused) >= 20 and {"rank-00000-of-00002.safetensors", "manifest.json"} <= files
    assert found[0][-1][0] == "saved"


def _save_without_room(disk: Path) -> list[str]:
    checkpoints = states.writer(disk / "checkpoints")
    _save(disk / "checkpoints", checkpoints, 1)
    if rank() == 0:
        (disk / "ballast").write_bytes(b"x" * (_DISK_KB - 1500) * 1024)
    barrier()
    return [_save(disk / "checkpoints", checkpoints, 2), *_names(disk / "checkpoints")]


def test_too_little_room_is_known_before_anything_is_written(disk: Path, run_ranks: Callable) -> None:
    found = run_ranks(2, _save_without_room, disk)
    assert found[0] == found[1]
    assert f"{disk}/checkpoints: the checkpoint of step 2 needs 2." in found[0][0] and "MB are free" in found[0][0]
    assert found[0][1:] == ["latest", "step-00000001"]


def _save_on_read_only(disk: Path) -> list[str]:
    folder = disk / "checkpoints"
    checkpoints = states.writer(folder)
    found = [_save(folder, checkpoints, 1)]
    barrier()
    if rank() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    barrier()
    found.append(_save(folder, checkpoints, 2))
    with pytest.raises(CheckpointError) as raised:
        states.writer(folder)
    return [*found, str(raised.value), *_names(folder)]


def test_a_disk_that_may_not_be_written(disk: Path, run_ranks: Callable) -> None:
    found = run_ranks(2, _save_on_read_only, disk)
    assert found[0] == found[1]
    remedy = "Read-only file system; make room, or choose another output_dir"
    assert found[0][0] == "saved"
    assert found[0][1] == f"checkpoint of step 2: {disk}/checkpoints/.step-00000002.reid_dist-partial: {remedy}"
    assert found[0][2].endswith(remedy) and f"{disk}/checkpoints" in found[0][2]
    assert found[0][3:] == ["latest", "step-00000001"]
