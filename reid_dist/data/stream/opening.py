"""A tar opened for one pass from its beginning, wherever it lies."""

import io
import os
import stat
from typing import IO, Any

from reid_dist.data.remote import file_size, is_remote, read_range, shown_location
from reid_dist.data.sample import MANIFEST_NAME
from reid_dist.data.stream.tar import BrokenShardError

_BUFFER_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 4 << 20


def open_tar(location: str, expected: int | None, remedy: str) -> IO[bytes]:
    """A tar at its beginning.

    Args:
        location: local path or URL.
        expected: bytes by the manifest; None without one.
        remedy: for the message about another size.

    Raises:
        BrokenShardError: another size than the manifest says, or no plain file.
        UserError: a remote file cannot be reached.
        OSError: a local one cannot be opened.
    """
    shown = shown_location(location)
    if is_remote(location):
        size = file_size(location) if expected is None else expected
        return io.BufferedReader(_RemoteTar(location, size), _REMOTE_BLOCK_BYTES)
    # Not blocking: a pipe under the name of a tar would otherwise be waited for.
    file = open(os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", _BUFFER_BYTES)  # noqa: SIM115
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode) or expected not in (None, state.st_size):
        file.close()
        what = f"{state.st_size} bytes, but {MANIFEST_NAME} says {expected}"
        raise BrokenShardError(f"{shown}: {what if stat.S_ISREG(state.st_mode) else 'not a file'}; {remedy}")
    return file


class _RemoteTar(io.RawIOBase):
    """A remote file read by ranges, each of which is retried."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._size - self._position))
        buffer[:size] = read_range(self._url, self._position, size)
        self._position += size
        return size
