"""Photographs as people keep them: of any size, turned by the camera, perhaps broken, perhaps a bomb."""

import functools
import io
import threading
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.search.entries import Entry, date_number

MAX_BYTES = 100_000_000
# More than the largest photograph of a telephone; decoded, three bytes a pixel.
MAX_PIXELS = 120_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# An allow-list: Pillow would otherwise try every format plug-in on bytes that come from outside.
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_IFD, _DATE_TAKEN, _DATE_CHANGED = 0x8769, 0x9003, 0x0132
_SHARDS = threading.Lock()  # a shard set is read from one thread


def decode_picture(data: bytes, name: str, size: tuple[int, int] | None = None) -> tuple[Image.Image, str | None]:
    """An image file as RGB, upright, and when its EXIF says that it was taken.

    Args:
        data: the file.
        name: what messages call it.
        size: (height, width) that it will be brought to: a large JPEG is then decoded smaller, though not below that.

    Raises:
        UserError: it does not decode or is above a cap.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap is checked next
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            if size is not None:
                # Twice the longer side: however the camera was turned, enough is left to resize well.
                image.draft("RGB", (2 * max(size), 2 * max(size)))
            date = _date(image)
            return ImageOps.exif_transpose(image).convert("RGB"), date
    except Exception as error:  # a damaged file makes Pillow raise OSError, but also SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: the image does not decode ({reason}); replace or remove it") from None
    raise UserError(f"{name}: {pixels} pixels, more than the cap of {MAX_PIXELS}; shrink the image")


def _date(image: Image.Image) -> str | None:
    """`2024-05-31T16:20:05` from EXIF; None where it says nothing, or no date."""
    exif = image.getexif()
    found = exif.get_ifd(_EXIF_IFD).get(_DATE_TAKEN) or exif.get(_DATE_CHANGED)
    day, _, time = str(found or "").strip("\0 ").partition(" ")
    date = f"{day.replace(':', '-')}T{time}"
    try:
        date_number(date)
    except UserError:
        return None
    return date


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB, upright; see `decode_picture`.

    Raises:
        UserError: it cannot be read, does not decode or is above a cap.
    """
    return decode_picture(picture_bytes(path), str(path), size)[0]


def picture_bytes(path: Path) -> bytes:
    """An image file.

    Raises:
        UserError: it cannot be read or is above the cap.
    """
    try:
        length = path.stat().st_size
        if length > MAX_BYTES:
            raise UserError(f"{path}: {length} bytes, more than the cap of {MAX_BYTES}; shrink the image")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def entry_bytes(entry: Entry) -> bytes:
    """The image file of an entry.

    Raises:
        UserError: it is gone, or its shard set is another one.
    """
    if entry.shards is None:
        return picture_bytes(Path(entry.file))
    with _SHARDS:
        shards = _shard_set(entry.shards)
        if not 0 <= entry.row < len(shards) or f"{int(shards.index[entry.row]['image_digest']):016x}" != entry.version:
            raise UserError(f"{entry.file}: is not in the shard set any more; run `index` again")
        return shards.image_bytes(entry.row)


@functools.lru_cache(maxsize=8)
def _shard_set(location: str) -> ShardSet:
    return ShardSet(location)


def entry_picture(entry: Entry, size: int) -> Image.Image:
    """The photograph of an entry as RGB, upright, not below `size` pixels where it has so many.

    Raises:
        UserError: it is gone or does not decode.
    """
    return decode_picture(entry_bytes(entry), entry.file, (size, size))[0]
