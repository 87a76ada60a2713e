"""Decoding and augmentation."""

import hashlib
import io
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from reid_dist.data import transforms
from reid_dist.data.transforms import Augment, decode_image, decode_into, decoder_name, sample_rng
from reid_dist.errors import UserError


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each decoder in turn."""
    if request.param == "pillow":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    transforms._simplejpeg.cache_clear()
    yield request.param
    monkeypatch.undo()
    transforms._simplejpeg.cache_clear()


def _file(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, quality=95)
    return buffer.getvalue()


def _gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, np.full_like(x, 90)], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 32), (128, 64), (20, 20)])
def test_decodes_to_the_size(decoder: str, size: tuple[int, int]) -> None:
    image = decode_image(_file(_gradient(256, 128)), size, "x")
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - _gradient(*size)).mean() < 4


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
def test_every_colour_mode_becomes_rgb(decoder: str, kind: str, mode: str) -> None:
    assert decode_image(_file(_gradient(40, 20), kind, mode), (40, 20), "x").shape == (40, 20, 3)


def test_truncated_image_names_the_sample(decoder: str) -> None:
    data = _file(_gradient(256, 128))
    with pytest.raises(UserError, match="shard 1, sample k: the image does not decode") as caught:
        decode_image(data[: len(data) // 2], (64, 32), "shard 1, sample k")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(50), b"\xff\xd8\xff\xe0" + bytes(99)])
def test_other_content_is_refused(decoder: str, data: bytes) -> None:
    with pytest.raises(UserError, match="does not decode") as caught:
        decode_image(data, (8, 8), "x")
    assert "0x" not in str(caught.value)  # an address in memory says nothing


def test_caps(decoder: str) -> None:
    with pytest.raises(UserError, match="cap of 4000000"):
        decode_image(_file(np.zeros((2001, 2000, 3), np.uint8)), (8, 8), "x")
    with pytest.raises(UserError, match="cap of 20000000"):
        decode_image(bytes(20_000_001), (8, 8), "x")


def _random_jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A smooth picture in one of the forms that JPEG files take."""
    rough = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
    options = {"quality": int(rng.integers(20, 96)), "progressive": bool(rng.integers(2))}
    if rng.random() < 0.2:
        image = image.convert("L")
    else:
        options["subsampling"] = int(rng.integers(0, 3))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_both_decoders_give_the_same_pixels() -> None:
    """They run the same library with the same settings: measured, no pixel of 400 such images differs.

    Another version of libjpeg-turbo under one of them may round otherwise, hence the small bound.
    """
    simplejpeg = pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(1)
    decoded = 0
    for _ in range(150):
        height, width = rng.integers(1, 300, 2).tolist()
        size = (height, width) if rng.random() < 0.3 else tuple(rng.integers(1, 200, 2).tolist())
        data = _random_jpeg(rng, height, width)
        fast = np.full((*size, 3), 77, np.uint8)
        decoded += transforms._decode_fast(simplejpeg, data, fast, "x")
        pillow = np.asarray(transforms._decode_pillow(data, size, "x"))
        assert np.abs(fast.astype(int) - pillow).max() <= 3, (height, width, size)
    assert decoded == 150


def test_damage_is_judged_by_pillow_alone() -> None:
    """Bytes overwritten at random: what simplejpeg takes, Pillow takes too and sees the same."""
    simplejpeg = pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(5)
    taken = 0
    for _ in range(300):
        data = bytearray(_random_jpeg(rng, *rng.integers(8, 120, 2).tolist()))
        for place in rng.integers(3, len(data), 2).tolist():
            data[place] = int(rng.integers(256))
        fast = np.empty((40, 20, 3), np.uint8)
        try:
            decoded = transforms._decode_fast(simplejpeg, bytes(data), fast, "x")
        except UserError:  # above the cap of pixels
            continue
        if decoded:
            taken += 1
            pillow = np.asarray(transforms._decode_pillow(bytes(data), (40, 20), "x"))
            assert np.abs(fast.astype(int) - pillow).max() <= 3
    assert taken > 50


def test_scaling_inside_the_decoder_stays_above_the_size(decoder: str) -> None:
    """Fine stripes survive as grey when averaged, and would turn black or white if pixels were left out."""
    stripes = np.zeros((256, 128, 3), np.uint8)
    stripes[::2] = 255
    for size in [(64, 32), (65, 33), (100, 50), (31, 16), (32, 100)]:
        image = decode_image(_file(stripes), size, "x")
        assert abs(float(image.mean()) - 127.5) < 3 and image.std() < 12, size


def test_decodes_into_a_place_of_a_batch(decoder: str) -> None:
    batch = np.full((3, 64, 32, 3), 7, np.uint8)
    for data in (_file(_gradient(64, 32)), _file(_gradient(256, 128)), _file(_gradient(50, 40), "PNG")):
        decode_into(data, batch[1], "x")
        assert np.array_equal(batch[1], decode_image(data, (64, 32), "x"))
        assert (batch[[0, 2]] == 7).all()


def test_what_is_accepted_does_not_depend_on_the_decoder(decoder: str) -> None:
    """A file with rubbish behind its end is whole, one with a missing end is not."""
    whole = _file(_gradient(64, 32))
    assert np.array_equal(decode_image(whole + b"rubbish", (64, 32), "x"), decode_image(whole, (64, 32), "x"))
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(UserError, match="does not decode"):
            decode_image(whole[: int(share * len(whole))], (64, 32), "x")


def test_the_decoder_is_named(decoder: str) -> None:
    name = decoder_name()
    assert name.startswith(decoder) and "resize pillow" in name and name.endswith("bicubic")


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


def test_erase_with_a_colour_covers_what_noise_would() -> None:
    image = np.full((64, 32, 3), 255, dtype=np.uint8)
    for row in range(50):
        noise = Augment(flip=0, erase=1)(image, sample_rng(0, 0, row))
        plain = Augment(flip=0, erase=1, erase_fill=(156, 147, 133))(image, sample_rng(0, 0, row))
        covered = (plain != image).all(axis=2)
        assert covered.any() and (plain[covered] == (156, 147, 133)).all()
        assert not (noise != image)[~covered].any()


def test_erase_probability() -> None:
    image = np.zeros((16, 8, 3), np.uint8)
    erased = [Augment(erase=0.5)(image, sample_rng(1, 0, row)).any() for row in range(400)]
    assert 0.4 < np.mean(erased) < 0.6


def test_older_settings_give_the_same_bits_as_ever() -> None:
    """The hash was taken at commit 0ca2938, before crop, operations and colour were there."""
    image = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (33, 17, 3), dtype=np.uint8)
    digest = hashlib.sha256()
    for row in range(50):
        digest.update(Augment(0.5, 3, 0.5, (0.02, 0.4), 0.2)(image, sample_rng(7, 2, row)).tobytes())
    assert digest.hexdigest() == "64adc8dc777275ae3b5452fbd83497c0f460865930da9a9c8df99baea6f50502"


FULL = Augment(flip=0.5, pad=2, erase=0.5, jitter=0.1, color=0.4, rand_ops=3, rand_magnitude=0.7, crop=0.5)


def test_everything_at_once_is_a_function_of_the_random_numbers() -> None:
    image = _gradient(31, 17)
    before = image.copy()
    results = [FULL(image, sample_rng(0, 0, row)) for row in range(30)]
    assert np.array_equal(image, before)
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert all(np.array_equal(FULL(image, sample_rng(0, 0, row)), results[row]) for row in range(30))
    assert len({result.tobytes() for result in results}) == 30


def test_the_same_number_of_draws_whatever_happens() -> None:
    """Without the rectangle, which comes last: the next number is the same for every image and every decision."""
    for augment in (Augment(pad=2, jitter=0.3), Augment(crop=0.3), Augment(color=0.2), Augment(rand_ops=2, crop=0.9)):
        following = set()
        for image in (_gradient(31, 17), np.zeros((8, 8, 3), np.uint8)):
            rng = sample_rng(3, 1, 4)
            augment(image, rng)
            following.add(float(rng.random()))
        assert len(following) == 1


def test_color_range() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = [int(Augment(flip=0, color=0.4)(grey, sample_rng(0, 0, row))[0, 0, 0]) for row in range(300)]
    # Contrast and saturation leave a grey image alone: only brightness is seen.
    assert 60 <= min(values) <= 63 and 137 <= max(values) <= 140
    assert abs(np.mean(values) - 100) < 4
