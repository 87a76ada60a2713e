"""Decoded images of shard sets, kept in memory where the user asks for it."""

import mmap
from typing import Any

import numpy as np

from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import Pixels, decode_image, decode_into
from reid_dist.errors import UserError

Size = tuple[int, int]


class ImageCache:
    """Memory for decoded, resized images, so that only the first epoch decodes.

    Hand the same object to every loader of a process: stages and evaluation then share the images. Worker processes
    forked later share the memory too; a pickled copy starts empty. Each rank has its own.

    Args:
        max_bytes: a set that would take the cache above this is decoded every time instead.
    """

    def __init__(self, max_bytes: int = 8 << 30) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._tables: dict[tuple[str, Size], tuple[Pixels, Pixels]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"max_bytes": self.max_bytes, "bytes": 0, "_tables": {}}

    def table(self, shards: ShardSet, size: Size) -> tuple[Pixels, Pixels] | None:
        """Room for all images of a set at a size, shared by everyone who asks for the same.

        Returns:
            Images, shape (rows, height, width, 3), and marks of those that are present, shape (rows,); None when they
            would not fit.
        """
        place = (shards.location, size)
        if place not in self._tables:
            count, pixels = len(shards), size[0] * size[1] * 3
            if not count or self.bytes + count * (pixels + 1) > self.max_bytes:
                return None
            # Anonymous shared memory: seen by forked workers, not limited by the size of /dev/shm, and taken
            # from the machine page by page as images arrive.
            images = np.frombuffer(mmap.mmap(-1, count * pixels), dtype=np.uint8).reshape(count, *size, 3)
            self._tables[place] = images, np.frombuffer(mmap.mmap(-1, count), dtype=np.uint8)
            self.bytes += count * (pixels + 1)
        return self._tables[place]


class Images:
    """The images of one set at one size: decoded, or from the cache.

    Args:
        shards: the set.
        size: (height, width).
        cache: None decodes every time.
    """

    def __init__(self, shards: ShardSet, size: Size, cache: ImageCache | None = None) -> None:
        self.shards = shards
        self.size = size
        self._table = cache.table(shards, size) if cache is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def cached(self) -> bool:
        """Whether images are kept."""
        return self._table is not None

    def __call__(self, row: int) -> Pixels:
        """RGB image of a row, not to be written to. Shape: (height, width, 3).

        Raises:
            UserError: the image does not decode; names set, shard and sample key.
        """
        if self._table is None:
            return self._decode(row)
        images, present = self._table
        if not present[row]:
            images[row] = self._decode(row)
            present[row] = 1  # after the pixels, for the sake of other processes
        image: Pixels = images[row]
        return image

    def into(self, row: int, out_HWC: Pixels) -> None:
        """Write the RGB image of a row to a place in a batch.

        Args:
            row: of the set.
            out_HWC: contiguous. Shape: (height, width, 3).

        Raises:
            UserError: the image does not decode; names set, shard and sample key.
        """
        if self._table is not None:
            out_HWC[...] = self(row)
            return
        data = self.shards.image_bytes(row)
        try:
            decode_into(data, out_HWC, "image")
        except UserError:
            decode_into(data, out_HWC, self.shards.describe(row))  # see _decode

    def _decode(self, row: int) -> Pixels:
        data = self.shards.image_bytes(row)
        try:
            return decode_image(data, self.size, "image")
        except UserError:
            # Decoded once more for the message: the name costs a read that only a bad image should pay.
            return decode_image(data, self.size, self.shards.describe(row))
