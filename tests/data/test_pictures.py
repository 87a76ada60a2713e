"""Photographs as people keep them: turned, dated, of foreign formats, broken, too large, or no files at all."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid_dist.data import pictures
from reid_dist.data.pictures import decode_picture, read_picture
from reid_dist.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 20, 4), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int, date: str | None = None) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if date is not None:
        exif[0x8769] = {0x9003: date}
    return exif


def test_photographs_are_turned_and_dated_as_their_exif_says(tmp_path: Path) -> None:
    wide = Image.new("RGB", (4000, 2000), (10, 200, 30))
    wide.save(tmp_path / "a.jpg", exif=turned(6, "2021:07:08 09:10:11"))  # by a quarter
    image, date = decode_picture((tmp_path / "a.jpg").read_bytes(), "a", (32, 16))
    assert date == "2021-07-08T09:10:11" and image.height == 2 * image.width
    assert 64 <= image.width < 1000  # decoded smaller, not below twice the size
    assert read_picture(tmp_path / "a.jpg").size == (2000, 4000)
    small = Image.fromarray(NOISE[..., :3])
    for wrong in ("0000:00:00 00:00:00", "2021:02:30 10:00:00", "yesterday", ""):
        assert decode_picture(encoded(small, "JPEG", exif=turned(1, wrong)), "b")[1] is None, wrong
    assert decode_picture(encoded(small), "c")[1] is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1"])
def test_every_mode_and_orientation_is_upright_rgb(mode: str) -> None:
    source = Image.fromarray(NOISE).convert("RGB").convert(mode)
    plain = np.asarray(source.convert("RGB"))
    for orientation, expected in ((1, plain), (3, plain[::-1, ::-1]), (6, np.rot90(plain, -1)), (8, np.rot90(plain))):
        image, _ = decode_picture(encoded(source, exif=turned(orientation)), "a")
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected), orientation


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = struct.pack(">IIBBBBB", 12_500, 12_000, 8, 2, 0, 0, 0)  # 600 MB, if it were decoded
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )
    with pytest.raises(UserError, match="bomb: 150000000 pixels, more than the cap of 120000000"):
        decode_picture(data, "bomb")
    small = encoded(Image.fromarray(NOISE))
    assert decode_picture(small, "a", max_pixels=800)[0].size == (20, 40)
    with pytest.raises(UserError, match="a: 800 pixels, more than the cap of 799"):
        decode_picture(small, "a", max_pixels=799)
    (tmp_path / "a.png").write_bytes(small)
    monkeypatch.setattr(pictures, "MAX_BYTES", len(small))
    assert read_picture(tmp_path / "a.png").size == (20, 40)
    monkeypatch.setattr(pictures, "MAX_BYTES", len(small) - 1)
    with pytest.raises(UserError, match="more than the cap of"):
        read_picture(tmp_path / "a.png")


def test_what_is_no_picture_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.bmp").write_bytes(encoded(Image.fromarray(NOISE[..., :3]), "BMP"))
    with pytest.raises(UserError, match=r"b\.bmp: the image does not decode \(not JPEG, PNG or WebP\); replace"):
        read_picture(tmp_path / "b.bmp")
    (tmp_path / "cut.png").write_bytes(encoded(Image.fromarray(NOISE))[:500])
    with pytest.raises(UserError, match=r"cut\.png: the image does not decode"):
        read_picture(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_picture(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=r"cannot be read \(not a regular file\)"):
            read_picture(path)
