"""Metadata leaves, pixels stay."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from reid_dist.errors import UserError
from shards.writing.jpeg import clean_image, strip_metadata

SECRET = b"Jane Doe, 52.5N 13.4E"


def _picture(height: int = 48, width: int = 32) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([y * 5 % 256, x * 7 % 256, (x + y) * 3 % 256], -1).astype(np.uint8))


def _encode(image: Image.Image, kind: str = "JPEG", orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRET.decode()
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, icc_profile=b"profile " + SECRET, **options)
    return buffer.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_metadata_is_cut_out_without_reencoding(options: dict[str, object], mode: str) -> None:
    data = _encode(_picture().convert(mode), comment=SECRET, **options) + SECRET
    cleaned, width, height, encoded = clean_image(data, "x")
    assert (width, height) == (32, 48) and not encoded
    assert SECRET in data and SECRET not in cleaned and b"Exif" not in cleaned and b"ICC" not in cleaned
    assert np.array_equal(_pixels(cleaned), _pixels(data))
    image = Image.open(io.BytesIO(cleaned))
    assert not image.getexif() and "icc_profile" not in image.info and "comment" not in image.info
    # All that is left stands unchanged in the original: nothing was encoded again.
    scan = cleaned[cleaned.index(b"\xff\xda") :]
    assert scan in data
    assert clean_image(cleaned, "x")[0] == cleaned


@pytest.mark.parametrize("marker", [b"\xff\xed", b"\xff\xe0", b"\xff\xee", b"\xff\xfe"])
def test_other_application_segments_leave_too(marker: bytes) -> None:
    data = _encode(_picture())
    segment = marker + (len(SECRET) + 2).to_bytes(2, "big") + SECRET
    assert SECRET not in clean_image(data[:2] + segment + data[2:], "x")[0]


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_rotation_is_applied_once(orientation: int) -> None:
    data = _encode(_picture(), orientation=orientation, quality=95)
    cleaned, width, height, encoded = clean_image(data, "x")
    assert encoded
    upright = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 6: lambda a: np.rot90(a, -1), 8: np.rot90}
    expected = upright[orientation](np.asarray(_picture()).astype(int))
    assert (height, width) == expected.shape[:2]
    assert np.abs(_pixels(cleaned) - expected).mean() < 8
    assert SECRET not in cleaned and not Image.open(io.BytesIO(cleaned)).getexif()


@pytest.mark.filterwarnings("error")
def test_damaged_exif_data_leave_without_harm() -> None:
    """Pillow raises anything from SyntaxError to AttributeError when it reads or writes such data."""
    data = _encode(_picture(), orientation=6)
    start, end = data.index(b"Exif") + 6, data.index(b"ICC_PROFILE") - 4
    for place in range(start, end):
        for value in (0, 5, 6, 8, 11, 22, 26, 41, 255):
            cleaned = clean_image(data[:place] + bytes([value]) + data[place + 1 :], "x")
            assert SECRET not in cleaned.data and b"Exif" not in cleaned.data
            assert (cleaned.width, cleaned.height) in ((32, 48), (48, 32)), (place - start, value)


def test_an_image_too_long_for_a_jpeg_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="x: 65501 x 2 pixels, too long for a JPEG"):
        clean_image(_encode(Image.new("RGB", (65_501, 2)), "PNG"), "x")


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("JPEG", "CMYK")])
def test_other_kinds_are_encoded(kind: str, mode: str) -> None:
    cleaned, width, height, encoded = clean_image(_encode(_picture().convert(mode), kind), "x")
    assert encoded
    image = Image.open(io.BytesIO(cleaned))
    assert (image.format, image.mode, image.size, (width, height)) == ("JPEG", "RGB", (32, 48), (32, 48))
    assert SECRET not in cleaned
    assert np.abs(_pixels(cleaned) - np.asarray(_picture()).astype(int)).mean() < 8


def test_further_pictures_of_a_camera_file_are_cut_off() -> None:
    buffer = io.BytesIO()
    _picture().save(buffer, "MPO", save_all=True, append_images=[_picture(24, 24)])
    cleaned, width, height, encoded = clean_image(buffer.getvalue(), "x")
    assert not encoded and (width, height) == (32, 48) and buffer.getvalue().count(b"\xff\xd8\xff") == 2
    assert cleaned.count(b"\xff\xd8\xff") == 1 and Image.open(io.BytesIO(cleaned)).format == "JPEG"
    assert np.array_equal(_pixels(cleaned), _pixels(buffer.getvalue()))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_becomes_white(kind: str) -> None:
    image = _picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    pixels, alpha = np.asarray(image)[..., :3].astype(float), np.asarray(image)[..., 3:] / 255
    buffer = io.BytesIO()
    image.save(buffer, kind, lossless=True)
    assert np.abs(_pixels(clean_image(buffer.getvalue(), "x").data) - pixels * alpha - 255 * (1 - alpha)).mean() < 8


@pytest.mark.parametrize("mode", ["1", "P", "LA", "I;16"])
def test_kinds_of_grey(mode: str) -> None:
    grey = np.repeat(np.arange(0, 256, 8, dtype=np.uint8), 16).reshape(32, 16)
    if mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert np.abs(_pixels(clean_image(buffer.getvalue(), "x").data) - grey[..., None]).max() < 12


@pytest.mark.parametrize("data", [b"", b"text", b"GIF89a" + bytes(60), b"\xff\xd8\xff\xe0\x00\x04ab"])
def test_undecodable_names_the_file(data: bytes) -> None:
    with pytest.raises(UserError, match=r"cam_a/1\.jpg: the image does not decode .*; replace the file") as caught:
        clean_image(data, "cam_a/1.jpg")
    assert "\n" not in str(caught.value)


def test_truncated_is_undecodable() -> None:
    data = _encode(_picture(200, 100))
    with pytest.raises(UserError, match="does not decode"):
        clean_image(data[:-400], "x")


def test_caps() -> None:
    with pytest.raises(UserError, match="2001 x 2000 pixels"):
        clean_image(_encode(Image.new("L", (2001, 2000))), "x")
    with pytest.raises(UserError, match="20000001 bytes"):
        clean_image(bytes(20_000_001), "x")


def test_a_bomb_is_refused_by_its_header(recwarn: pytest.WarningsRecorder) -> None:
    """A PNG of 100 million pixels can be 100 kB; decoded it is 300 MB."""
    data = bytearray(_encode(Image.new("RGB", (8, 8)), "PNG"))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match=r"x: 10000 x 10000 pixels, more than the cap of 4000000; shrink the image"):
        clean_image(bytes(data), "x")
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # above what Pillow itself opens
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match="x: the image does not decode"):
        clean_image(bytes(data), "x")
    assert not recwarn.list


def test_segments_that_cannot_be_followed() -> None:
    data = _encode(_picture())
    start = data.index(b"\xff\xda")
    for broken in (b"", data[:1], data[:2], data[:40], data[: start + 30], data[:2] + b"\x00" + data[3:]):
        assert strip_metadata(broken) is None


def test_strip_survives_noise() -> None:
    data = bytearray(_encode(_picture()))
    rng = np.random.default_rng(0)
    for _ in range(300):
        spoiled = bytearray(data)
        spoiled[int(rng.integers(2, len(data)))] = int(rng.integers(256))
        result = strip_metadata(bytes(spoiled))
        assert result is None or len(result) <= len(spoiled)
