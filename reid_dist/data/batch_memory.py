"""Memory in which worker processes make the images of batches, so that no image travels between processes.

Legend: B images of a batch.
"""

import mmap
import weakref
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from reid_dist.data.transforms import Pixels

Size = tuple[int, int]


class BatchMemory:
    """A few places for batches, used over and over: fresh memory costs about as much as decoding into it.

    Made before the workers are forked, which then see the same memory. The parent takes a place for a batch, a worker
    fills it, and the parent wraps it in a tensor. The place is free again when nothing refers to that tensor or a
    view of it any more, so a consumer may keep batches as long as it likes. One thread of the parent uses it. A
    pickled copy (spawned workers) has no places.

    Args:
        places: number of batches.
        batch_size: most images of a batch.
        size: (height, width).
    """

    def __init__(self, places: int, batch_size: int, size: Size) -> None:
        shape = (places, batch_size, *size, 3)
        # Anonymous: not limited by the size of /dev/shm, and nothing is left behind when a process is killed.
        self._images: Pixels = np.frombuffer(mmap.mmap(-1, max(1, int(np.prod(shape)))), np.uint8)
        self._images = self._images[: int(np.prod(shape))].reshape(shape)
        self._free = list(range(places))

    def __getstate__(self) -> dict[str, Any]:
        return {"_images": self._images[:0].copy(), "_free": []}

    def take(self) -> int:
        """A free place, or -1: the batch then has to travel."""
        return self._free.pop() if self._free else -1

    def release(self, place: int) -> None:
        """Give back a place that no tensor was made of."""
        if place >= 0:
            self._free.append(place)

    def array(self, place: int, count: int) -> Pixels | None:
        """Where a worker writes. Shape: (count, height, width, 3); None where there is no such place here."""
        if not 0 <= place < len(self._images):
            return None
        array: Pixels = self._images[place, :count]
        return array

    def tensor(self, place: int, count: int) -> torch.Tensor:
        """The images of a filled place, not copied. Shape: (count, height, width, 3)."""
        # torch keeps this array for as long as any tensor uses its memory.
        array = self._images[place, :count]
        weakref.finalize(array, self._free.append, place).atexit = False
        return torch.from_numpy(array)


def image_buffer(count: int, size: Size) -> torch.Tensor:
    """Uninitialised memory for the images of a batch, uint8; in a worker process shared, so that it can be sent.

    Returns:
        Shape: (count, height, width, 3).
    """
    shape = (count, *size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's own collate function does: share_memory_() would copy what is not there yet.
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
