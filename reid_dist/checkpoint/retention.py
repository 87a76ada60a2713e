"""The folder of a stage's checkpoints: which are there, which is the latest, which stay."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from reid_dist.checkpoint.manifest import MANIFEST_FILE, step_of
from reid_dist.checkpoint.tensor_file import write_blocks
from reid_dist.files import aside, beside, flush

LATEST_FILE = "latest"


def saved_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder that have a manifest, by step in order; times do not matter."""
    if not folder.is_dir():
        return {}
    found = {step_of(path): path for path in folder.iterdir() if (path / MANIFEST_FILE).is_file()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def clean(folder: Path) -> None:
    """Removes what saves that were killed have left; may raise OSError. Nobody may be saving there."""
    for path in folder.glob(".*.reid_dist-*"):
        whole = path.parent / path.name[1:].rpartition(".reid_dist-")[0]
        # A checkpoint of the same step was being replaced, between the two renames: it is the only one of its step.
        if path == aside(whole) and (path / MANIFEST_FILE).is_file() and not whole.exists():
            path.rename(whole)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_latest(folder: Path, name: str) -> None:
    """Names the checkpoint that a run goes on from, by a rename; may raise OSError."""
    partial = beside(folder / LATEST_FILE, "partial")
    try:
        write_blocks(partial, [f"{name}\n".encode()])
        partial.rename(folder / LATEST_FILE)
    finally:
        partial.unlink(missing_ok=True)
    flush(folder)


def purge(folder: Path, step: int, keep: int, best: bool) -> None:
    """Removes old checkpoints; may raise OSError.

    Later steps than `step` go too: a run that went on from an earlier checkpoint has left them behind.

    Args:
        folder: of the stage's checkpoints.
        step: that was saved last; it stays.
        keep: how many of the last ones stay.
        best: the one with the lowest loss stays besides.
    """
    found = saved_steps(folder)
    past = [number for number in found if number <= step]
    stay = set(past[-keep:])
    if best and (losses := {loss: number for number in past if (loss := _loss(found[number])) is not None}):
        stay.add(losses[min(losses)])
    for number, path in found.items():
        if number not in stay:
            # First: what is half removed is no checkpoint.
            (path / MANIFEST_FILE).unlink()
            flush(path)
    for path in _without_manifest(folder):
        # A network file system keeps files that somebody still reads: the rest goes at the next save.
        shutil.rmtree(path, ignore_errors=True)


def purge_finished(folder: Path, best: bool) -> None:
    """Removes the checkpoints of a finished stage, whose export is what stays; may raise OSError.

    Args:
        folder: of the stage's checkpoints.
        best: the one with the lowest loss stays.
    """
    found = saved_steps(folder)
    if best and found:
        purge(folder, max(found), 1, best)
    elif folder.is_dir():
        (folder / LATEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _without_manifest(folder: Path) -> Iterable[Path]:
    return [path for path in folder.iterdir() if step_of(path) is not None and not (path / MANIFEST_FILE).is_file()]


def _loss(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / MANIFEST_FILE).read_text())["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: reading it will say so, and it is not the best
    return float(loss) if isinstance(loss, (int, float)) else None
