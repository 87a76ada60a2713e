"""The folder of an export: whole or not there, and never in place of what is someone else's."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.files import content_sha256, flush, replace_folder

MARKER = "export.json"  # lists the files of the folder with their hashes; what it does not list is not ours
FORMAT_VERSION = 1


def check_target(target: Path, source: Path) -> None:
    """Refuses a place where an export would bury something.

    Args:
        target: a new folder, an empty one, or an earlier export, which is replaced.
        source: the export that is read.

    Raises:
        UserError: what is there instead.
    """
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"--out {target}: holds the model that is to be exported; name another folder")
    above = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise UserError(f"--out {target}: {above} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        own = listed_files(target)
        foreign = sorted({file.name for file in target.iterdir()} - ({MARKER, *own} if own else set()))
        if foreign:
            raise UserError(f"--out {target}: holds {foreign[0]}, which is no export of ours; name another folder")


@contextmanager
def new_folder(target: Path, description: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error and is removed otherwise.

    Args:
        target: see `check_target`, which comes first.
        description: what `export.json` says beside the list of files; the block may add to it.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        files = {file.name: content_sha256(file) for file in sorted(partial.iterdir())}
        told = {"format_version": FORMAT_VERSION, **description, "files": files}
        (partial / MARKER).write_text(json.dumps(told, indent=1) + "\n")
        for file in partial.iterdir():
            flush(file)
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def listed_files(folder: Path) -> dict[str, str]:
    """Name and hash of what an export of ours wrote into a folder; empty for any other folder."""
    try:
        return {str(name): str(digest) for name, digest in json.loads((folder / MARKER).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
