"""The photograph behind an entry of an index: an image file, or a sample of a shard set."""

import functools
import threading
from pathlib import Path

from PIL import Image

from reid_dist.data.pictures import decode_picture, picture_bytes
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import INDEX_NAME, MANIFEST_NAME
from reid_dist.errors import UserError
from reid_dist.search.entries import Entry

_SHARDS = threading.Lock()  # a shard set is read from one thread


def entry_bytes(entry: Entry) -> bytes:
    """The image file of an entry.

    Raises:
        UserError: it is gone, or its shard set is another one.
    """
    if entry.shards is None:
        return picture_bytes(Path(entry.file))
    with _SHARDS:
        shards = _shard_set(entry.shards)
        if not _holds(shards, entry):
            raise UserError(f"{entry.file}: is not in the shard set any more; run `index` again")
        return shards.image_bytes(entry.row)


def is_gone(entry: Entry) -> bool:
    """Whether an entry's file, or its sample, is not there any more.

    Raises:
        UserError: its shard set is damaged.
        OSError: a folder on the way may not be read.
    """
    if entry.shards is None:
        return not Path(entry.file).exists()
    if not Path(entry.shards, MANIFEST_NAME).exists():
        return True
    with _SHARDS:
        return not _holds(_shard_set(entry.shards), entry)


def entry_picture(entry: Entry, size: int) -> Image.Image:
    """The photograph of an entry as RGB, upright, not below `size` pixels where it has so many.

    Raises:
        UserError: it is gone or does not decode.
    """
    return decode_picture(entry_bytes(entry), entry.file, (size, size))[0]


def _holds(shards: ShardSet, entry: Entry) -> bool:
    row = entry.row
    return 0 <= row < len(shards) and f"{int(shards.index[row]['image_digest']):016x}" == entry.version


def _shard_set(location: str) -> ShardSet:
    """The set as it is now."""
    index = Path(location, INDEX_NAME)
    return _opened(location, index.stat().st_mtime_ns if index.is_file() else 0)


@functools.lru_cache(maxsize=8)
def _opened(location: str, _: int) -> ShardSet:
    return ShardSet(location)
