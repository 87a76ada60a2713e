"""Files and folders that are whole or not there: hash, flush, and the rename that gives one its name."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def content_sha256(path: Path) -> str:
    """Hash of a file's content, as hexadecimal digits; may raise OSError."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; may raise OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # of a descriptor, it names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def beside(path: Path, purpose: str) -> Path:
    """A name beside a file or folder that nobody else picks: what has it is ours to overwrite and to remove."""
    return path.parent / f".{path.name}.reid_dist-{purpose}"


def aside(folder: Path) -> Path:
    """Where `replace_folder` puts the folder that was there; it stays when the program is killed meanwhile."""
    return beside(folder, "old")


def replace_folder(partial: Path, folder: Path) -> None:
    """Gives a folder whose files are flushed its name, in place of the one that has it.

    Killed at any moment, it leaves a whole folder: the new one or the old one, the latter perhaps at `aside`.
    """
    flush(partial)
    # Moved whole: a removal that is killed half-way would leave a part. Without `folder`, what lies aside is the only
    # one until the second rename.
    if folder.exists():
        shutil.rmtree(aside(folder), ignore_errors=True)
        folder.rename(aside(folder))
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(aside(folder), ignore_errors=True)


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Writes the results as indented JSON; nan and tensors are refused before anything is written.

    Raises:
        ValueError: a number is nan or infinite.
        TypeError: a value has no JSON form.
    """
    write_bytes(path, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all; its folder is made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name, flushes it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    flush(partial)
    partial.rename(path)
