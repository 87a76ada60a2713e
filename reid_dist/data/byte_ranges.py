"""Byte ranges of local and remote files by location, from one process and its forks."""

import os
import stat
from typing import Any

from reid_dist.data import remote
from reid_dist.errors import UserError

# Far below the usual limit of 1,024 descriptors per process, of which the job needs some for itself.
MAX_OPEN_FILES = 256


class ByteRanges:
    """Reads parts of many files; keeps the last local ones open.

    Descriptors are left out of pickles. Forked processes share them: `pread` has no position that they could fight
    over. One process uses an object from one thread.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, location: str, offset: int, size: int) -> bytes:
        """These bytes of a file.

        Raises:
            UserError: the file cannot be opened or read, or is too short.
        """
        descriptor = self._descriptors.get(location)
        if descriptor is None:
            if remote.is_remote(location):
                return remote.read_range(location, offset, size)
            descriptor = self._open(location)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{location}: cannot be read ({error.strerror}); restore it from a copy") from None
        if len(data) != size:
            raise UserError(f"{location}: ends inside a sample; restore it from a copy")
        return data

    def _open(self, location: str) -> int:
        if len(self._descriptors) >= MAX_OPEN_FILES:
            os.close(self._descriptors.pop(next(iter(self._descriptors))))
        try:
            # Not blocking: a pipe under the name of a shard would otherwise be waited for.
            descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{location}: cannot be opened ({error.strerror}); restore it from a copy") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{location}: not a file; restore it from a copy")
        self._descriptors[location] = descriptor
        return descriptor
