"""Files that are there whole or not at all, even after a power cut, and the leftovers of killed programs."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


class Temporary:
    """A file that is being written under another name beside its own.

    It is locked while its writer lives, so that `remove_leftovers` of another program does not take it.

    Attributes:
        path: the name that it will have.
        file: open for writing.

    Args:
        path: see above.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
            self.file: IO[bytes] = self._name.open("xb")
            _lock(self.file, fcntl.LOCK_EX)
            if self._name.exists():  # else it was taken for a leftover before it was locked
                break
            self.file.close()

    def commit(self) -> None:
        """Give the file its name once all of it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self._name, self.path)
        self.file.close()
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written; nothing after `commit`."""
        self.file.close()
        self._name.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = Temporary(path)
    try:
        write(temporary.file)
        temporary.commit()
    finally:
        temporary.discard()


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of one that is being written."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove the temporary files of programs that are gone.

    Args:
        folder: where to look; may be absent.
        names: only those of these files; None: of all files.
    """
    for path in folder.glob(".*.partial"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (names is None or match[1] in names):
            _remove_if_dead(path)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove_if_dead(path: Path) -> None:
    try:
        with path.open("rb+") as file:
            if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                path.unlink(missing_ok=True)
    except FileNotFoundError:  # its writer has just finished
        pass


def _lock(file: IO[bytes], operation: int) -> bool:
    """Lock a file; False when another program holds it, or when the file system has no locks to tell by."""
    try:
        fcntl.flock(file.fileno(), operation)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this with folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
