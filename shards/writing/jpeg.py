"""Images on their way into a shard: verified, freed of metadata, re-encoded only where needed."""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from reid_dist.data.sample import MAX_IMAGE_BYTES, MAX_PIXELS
from reid_dist.errors import UserError

ENCODED_QUALITY = 95

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
# What turns a picture upright.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# libjpeg's limit.
_MAX_SIDE = 65_500

# JFIF says how pixels are laid out and Adobe how colours are coded: a decoder needs these two. The other APPn
# segments (EXIF with GPS, XMP, ICC, IPTC, previews) and comments may tell where, when and by whom.
_KEPT_APPLICATION_SEGMENTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_START_OF_SCAN, _END_OF_IMAGE, _COMMENT = 0xDA, 0xD9, 0xFE
# Inside a scan, ff is followed by 00 or a restart marker; anything else ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class CleanImage(NamedTuple):
    """An image fit for a shard.

    Attributes:
        data: a JPEG without metadata.
        width: pixels.
        height: pixels.
        encoded: it was decoded and encoded anew; otherwise the bytes of its picture are those of the raw file.
    """

    data: bytes
    width: int
    height: int
    encoded: bool


def clean_image(data: bytes, name: str) -> CleanImage:
    """Make an image fit for a shard.

    The bytes of a JPEG are copied but for its metadata segments. An image that is turned by its EXIF orientation, is
    not a JPEG, or has other colours than grey or RGB, is decoded and encoded once at quality 95, upright.

    Args:
        data: the file.
        name: what error messages call it.

    Raises:
        UserError: it does not decode, or is above 20 MB or 4 million pixels.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise UserError(f"{name}: {len(data)} bytes, more than the cap of {MAX_IMAGE_BYTES}; shrink the image")
    image = _open(data, name)
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{name}: {image.width} x {image.height} pixels, more than the cap of {MAX_PIXELS}; shrink the image"
        )
    _load(image, name)
    orientation = _orientation(image)
    # MPO is a JPEG with further pictures behind its end, as cameras write them; those are cut off.
    if image.format in ("JPEG", "MPO") and orientation in (0, 1) and image.mode in ("L", "RGB"):
        stripped = strip_metadata(data)
        if stripped is not None:
            return CleanImage(stripped, image.width, image.height, encoded=False)
    # Not Pillow's exif_transpose: it writes the other tags anew, which a damaged one ends with any exception.
    upright = _rgb(image.transpose(_TURNS[orientation]) if orientation in _TURNS else image)
    if max(upright.size) > _MAX_SIDE:
        raise UserError(f"{name}: {upright.width} x {upright.height} pixels, too long for a JPEG; shrink the image")
    buffer = io.BytesIO()
    # An empty profile, as Pillow would otherwise copy that of the source.
    upright.save(buffer, "JPEG", quality=ENCODED_QUALITY, icc_profile=b"", exif=b"", comment=b"")
    if buffer.tell() > MAX_IMAGE_BYTES:
        raise UserError(f"{name}: {buffer.tell()} bytes as a JPEG, more than the cap of {MAX_IMAGE_BYTES}; shrink it")
    return CleanImage(buffer.getvalue(), upright.width, upright.height, encoded=True)


def strip_metadata(data: bytes) -> bytes | None:
    """A JPEG without metadata segments and without bytes after its end; the picture's bytes stay as they are.

    Returns:
        The shorter file, or None when its segments cannot be followed.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    kept = [b"\xff\xd8"]
    position = 2
    while True:
        start = position
        if data[position : position + 1] != b"\xff":
            return None
        while data[position : position + 1] == b"\xff":  # fill bytes may stand before a marker
            position += 1
        if position >= len(data):
            return None
        marker = data[position]
        position += 1
        if marker == _END_OF_IMAGE:
            kept.append(b"\xff\xd9")
            return b"".join(kept)
        if marker in _STANDALONE_MARKERS:
            continue
        content = position + 2
        position += int.from_bytes(data[position:content], "big")
        if marker == _START_OF_SCAN:
            end = _END_OF_SCAN.search(data, position)
            if end is None:
                return None
            position = end.start()
        if not _is_metadata(marker, data[content : content + 5]):
            kept.append(data[start:position])


def _orientation(image: Image.Image) -> object:
    """What EXIF or XMP says; 1, upright, where they are too damaged to tell: the picture is whole all the same."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of corrupt EXIF data, which is left out anyway
            orientation: object = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # SyntaxError, struct.error, TypeError, ...
        return 1
    return orientation


def _is_metadata(marker: int, beginning: bytes) -> bool:
    if 0xE0 <= marker <= 0xEF:
        return _KEPT_APPLICATION_SEGMENTS.get(marker) != beginning
    return marker == _COMMENT


def _rgb(image: Image.Image) -> Image.Image:
    """An image in 8 bit RGB; what is transparent becomes white, as on a page."""
    if image.mode.startswith("I"):
        # 16 bit grey, which Pillow's own conversion cuts at 255.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _open(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Reads the header only. Pillow warns of many pixels, where our own cap is far lower, and of damaged EXIF
            # data, which are left out anyway.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # damaged files raise OSError, but also SyntaxError, struct.error, ...
        raise _undecodable(name, error) from None


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except Exception as error:
        raise _undecodable(name, error) from None


def _undecodable(name: str, error: Exception) -> UserError:
    reason = re.sub(r"<_io\.BytesIO object[^>]*>", "its content", str(error))
    return UserError(f"{name}: the image does not decode ({reason}); replace the file, or remove it and its entry")
