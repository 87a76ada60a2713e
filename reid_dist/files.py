"""Files and folders that are whole or not there: hash, flush, and the rename that gives a folder its name."""

import hashlib
import os
import shutil
from pathlib import Path


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
    finally:
        os.close(descriptor)


def aside(folder: Path) -> Path:
    """Where `replace_folder` puts the folder that was there; it stays when the program is killed meanwhile."""
    return folder.with_name(folder.name + ".old")


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
