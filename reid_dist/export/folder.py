"""The folder of an export: whole or not there, and never in place of what is someone else's."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.files import aside, beside, content_sha256, flush, replace_folder

MARKER = "export.json"  # lists the files of the folder with their hashes; what it does not list is not ours
# Scores that launch/evaluate.py recorded of an export; each names the weights that it is of, so they may stay.
SCORES = "evaluation"
FORMAT_VERSION = 1


def check_target(target: Path, source: Path) -> None:
    """Refuses a place where an export would bury something.

    Args:
        target: a new folder, an empty one, or an earlier export, which is replaced but for the scores in it.
        source: the export that is read.

    Raises:
        UserError: what is there instead.
    """
    model = Path(os.path.realpath(source))
    if Path(os.path.realpath(target)) in (model, *model.parents):
        raise UserError(f"--out {target}: holds the model that is to be exported; name another folder")
    places = (target, *target.absolute().parents)
    above = next(folder for folder in places if folder.exists() or folder.is_symlink())
    if not above.is_dir():
        raise UserError(f"--out {target}: {above} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        own = listed_files(target)
        foreign = sorted({file.name for file in target.iterdir()} - ({MARKER, SCORES, *own} if own else set()))
        if foreign:
            raise UserError(f"--out {target}: holds {foreign[0]}, which is no export of ours; name another folder")


@contextmanager
def new_folder(target: Path, source: Path, description: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error and is removed otherwise.

    Args:
        target: see `check_target`, which is asked at the beginning and before anything is replaced; no link, no `.`.
        source: the export that is read.
        description: what `export.json` says beside the list of files; the block may add to it.

    Raises:
        UserError: see `check_target`, or another process writes this folder.
    """
    check_target(target, source)
    partial = beside(target, "partial")
    with _alone(target):
        if not target.exists() and (aside(target) / MARKER).is_file():
            aside(target).rename(target)  # killed between the two renames
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir()
        try:
            yield partial
            files = {file.name: content_sha256(file) for file in sorted(partial.iterdir())}
            told = {"format_version": FORMAT_VERSION, **description, "files": files}
            (partial / MARKER).write_text(json.dumps(told, indent=1) + "\n")
            check_target(target, source)
            if (target / SCORES).is_dir():
                shutil.copytree(target / SCORES, partial / SCORES)
            for file in partial.rglob("*"):
                flush(file)
            replace_folder(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Only one process writes a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = beside(target, "lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False  # or another process's that has just ended, and removed its file
        if not mine:
            raise UserError(f"--out {target}: another export is being written there; wait until it has ended")
        try:
            yield
        finally:
            path.unlink()


def listed_files(folder: Path) -> dict[str, str]:
    """Name and hash of what an export of ours wrote into a folder; empty for any other folder."""
    try:
        return {str(name): str(digest) for name, digest in json.loads((folder / MARKER).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
