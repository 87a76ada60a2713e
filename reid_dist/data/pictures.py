"""Photographs as people keep them: of any size, turned by the camera, perhaps broken, perhaps a bomb."""

import datetime
import io
import stat
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from reid_dist.errors import UserError

MAX_BYTES = 100_000_000
# More than the largest photograph of a telephone. Decoding takes, measured with Pillow 12.3, 4 bytes a pixel, 8 where
# the picture is turned or converted, 10 for a progressive JPEG and 16 for WebP: up to 2 GB in each thread that meets
# one at the cap. Where strangers send pictures, ask for a lower one.
MAX_PIXELS = 120_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# An allow-list: Pillow would otherwise try every format plug-in on bytes that come from outside.
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_IFD, _DATE_TAKEN, _DATE_CHANGED = 0x8769, 0x9003, 0x0132


def decode_picture(
    data: bytes, name: str, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, str | None]:
    """An image file as RGB, upright, and when its EXIF says that it was taken.

    Args:
        data: the file.
        name: what messages call it.
        size: (height, width) that it will be brought to: a large JPEG is then decoded smaller, though not below that.
        max_pixels: the cap.

    Raises:
        UserError: it does not decode or is above a cap.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap is checked next
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels <= max_pixels:
            if size is not None:
                # Twice the longer side: however the camera was turned, enough is left to resize well.
                image.draft("RGB", (2 * max(size), 2 * max(size)))
            date = _date(image)
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB"), date
    except Exception as error:  # a damaged file makes Pillow raise OSError, but also SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # says only where in memory the bytes are
            reason = "not JPEG, PNG or WebP"
        raise UserError(f"{name}: the image does not decode ({reason}); replace or remove it") from None
    raise UserError(f"{name}: {pixels} pixels, more than the cap of {max_pixels}; shrink the image")


def _date(image: Image.Image) -> str | None:
    """`2024-05-31T16:20:05` from EXIF; None where it says nothing, or no date."""
    exif = image.getexif()
    found = exif.get_ifd(_EXIF_IFD).get(_DATE_TAKEN) or exif.get(_DATE_CHANGED)
    try:
        return datetime.datetime.strptime(str(found).strip("\0 "), "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return None


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB, upright; see `decode_picture`.

    Raises:
        UserError: it cannot be read, does not decode or is above a cap.
    """
    return decode_picture(picture_bytes(path), str(path), size)[0]


def picture_bytes(path: Path) -> bytes:
    """An image file.

    Raises:
        UserError: it cannot be read, is no file, or is above the cap.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device never ends
            raise UserError(f"{path}: cannot be read (not a regular file)")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than the cap of {MAX_BYTES} bytes; shrink the image")
    return data
