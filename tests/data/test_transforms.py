"""Decoding and augmentation."""

import io

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.transforms import Augment, decode_image, sample_rng
from reid_dist.errors import UserError


def _file(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, quality=95)
    return buffer.getvalue()


def _gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, np.full_like(x, 90)], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 32), (128, 64), (20, 20)])
def test_decodes_to_the_size(size: tuple[int, int]) -> None:
    image = decode_image(_file(_gradient(256, 128)), size, "x")
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - _gradient(*size)).mean() < 4


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
def test_every_colour_mode_becomes_rgb(kind: str, mode: str) -> None:
    assert decode_image(_file(_gradient(40, 20), kind, mode), (40, 20), "x").shape == (40, 20, 3)


def test_truncated_image_names_the_sample() -> None:
    data = _file(_gradient(256, 128))
    with pytest.raises(UserError, match="shard 1, sample k: the image does not decode") as caught:
        decode_image(data[: len(data) // 2], (64, 32), "shard 1, sample k")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(50), b"\xff\xd8\xff\xe0" + bytes(99)])
def test_other_content_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="does not decode"):
        decode_image(data, (8, 8), "x")


def test_caps() -> None:
    with pytest.raises(UserError, match="cap of 4000000"):
        decode_image(_file(np.zeros((2001, 2000, 3), np.uint8)), (8, 8), "x")
    with pytest.raises(UserError, match="cap of 20000000"):
        decode_image(bytes(20_000_001), (8, 8), "x")


def test_sample_rng_depends_on_each_argument() -> None:
    calls = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [sample_rng(*call).random(4).tolist() for call in calls]
    assert len({tuple(draw) for draw in draws}) == len(calls)
    assert sample_rng(0, 0, 1, 0).random(4).tolist() == draws[3]


def test_flip_and_shift() -> None:
    image = _gradient(8, 4)
    rng = sample_rng(0, 0, 0)
    assert np.array_equal(Augment(flip=1)(image, rng), image[:, ::-1])
    assert np.array_equal(Augment(flip=0)(image, rng), image)
    seen = set()
    for row in range(60):
        result = Augment(flip=0, pad=1)(image + 1, sample_rng(0, 0, row))
        assert result.shape == image.shape
        seen.add(
            (
                (result[0] == 0).all(),
                (result[-1] == 0).all(),
                (result[:, 0] == 0).all(),
                (result[:, -1] == 0).all(),
            )
        )
    assert len(seen) == 9  # every combination of up, down, left, right and none


def test_jitter_stays_within_its_range() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    values = [Augment(flip=0, jitter=0.15)(image, sample_rng(0, 0, row))[0, 0] for row in range(200)]
    assert 169 <= np.min(values) <= 174 and 226 <= np.max(values) <= 230
    white = np.full((4, 4, 3), 255, np.uint8)
    assert max(Augment(jitter=0.5)(white, sample_rng(0, 0, row)).max() for row in range(50)) == 255


def test_erase_takes_the_share_that_was_asked_for() -> None:
    image = np.zeros((64, 32, 3), np.uint8)
    shares = []
    for row in range(300):
        result = Augment(flip=0, erase=1)(image, sample_rng(0, 0, row))
        touched = result.any(axis=2)
        shares.append(touched.mean())
        ys, xs = np.nonzero(touched)
        # One rectangle (single black noise pixels are possible, whole missing rows are not).
        assert touched.sum() > 0.9 * (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
    assert 0.01 < min(shares) < 0.05 and 0.3 < max(shares) < 0.42
    assert not image.any()


def test_erase_probability() -> None:
    image = np.zeros((16, 8, 3), np.uint8)
    erased = [Augment(erase=0.5)(image, sample_rng(1, 0, row)).any() for row in range(400)]
    assert 0.4 < np.mean(erased) < 0.6
