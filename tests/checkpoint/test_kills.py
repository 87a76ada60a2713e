"""A save that is killed before any of its steps on the disk: the last checkpoint is whole, and the next save works."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.checkpoint import writer
from reid_dist.checkpoint.reader import open_checkpoint
from reid_dist.checkpoint.resume import choose
from tests.checkpoint import states

DISK_CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def _save_and_die(folder: Path, state: int, step: int, fatal: int) -> None:
    """Saves a state under a step; before the call number `fatal` that changes the disk this process kills itself."""
    done = 0

    def deadly(call: Callable) -> Callable:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    checkpoints = states.writer(folder, keep=1)
    for name in DISK_CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    checkpoints.save(step, states.pieces(state), states.private(state), states.record(step), wait=True)
    os._exit(0)


def _killed(folder: Path, state: int, step: int, fatal: int) -> bool:
    process = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(folder, state, step, fatal))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _digests(state: int, folder: Path) -> dict[str, str]:
    states.writer(folder).save(1, states.pieces(state), states.private(state), states.record(1), wait=True)
    return open_checkpoint(folder / "step-00000001").digests()


@pytest.mark.parametrize(
    ("before", "step"), [([], 1), ([1], 2), ([2], 2)], ids=["the first save", "the second", "one of the same step"]
)
def test_killed_anywhere_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int], step: int
) -> None:
    monkeypatch.setattr(writer, "commit", lambda: None)  # it asks git each time
    states.save(tmp_path / "before", *before)
    new = _digests(7, tmp_path / "new")
    old = open_checkpoint(tmp_path / "before" / f"step-0000000{before[0]}").digests() if before else None
    found, fatal, killed = [], 1, True
    while killed:
        folder = tmp_path / f"killed {fatal}"
        shutil.copytree(tmp_path / "before", folder)
        killed = _killed(folder, 7, step, fatal)
        chosen = choose(folder, "auto")
        found.append(None if chosen is None else open_checkpoint(chosen).digests())
        assert not list(folder.glob(".*"))
        states.save(folder, 9, keep=1)
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000009"]
        fatal += 1
    # First what there was, then what was saved; never anything else, and never back.
    turn = found.index(new)
    assert turn >= 10
    assert found == [old] * turn + [new] * (len(found) - turn)
