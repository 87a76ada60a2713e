"""The single changes of an image, each against what its name promises."""

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.image_ops import OPERATIONS, adjust_colour, random_operation, resized_crop


def _noise(height: int = 24, width: int = 13, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


def _apply(name: str, image: np.ndarray, magnitude: float, sign: int = 1) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(image), magnitude, sign)).astype(int)


UNSIGNED = {"auto_contrast", "equalize", "posterize", "solarize"}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize("size", [(24, 13), (1, 1), (3, 50)])
def test_keeps_shape_and_type(name: str, size: tuple[int, int]) -> None:
    for magnitude in (0.0, 0.5, 1.0):
        for sign in (0.1, 0.9):
            choice = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
            result = random_operation(_noise(*size), magnitude, choice, sign)
            assert result.shape == (*size, 3) and result.dtype == np.uint8


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize"}))
def test_magnitude_zero_changes_nothing(name: str) -> None:
    assert np.array_equal(_apply(name, _noise(), 0.0), _noise())


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - UNSIGNED))
def test_the_sign_matters(name: str) -> None:
    assert not np.array_equal(_apply(name, _noise(), 0.8, 1), _apply(name, _noise(), 0.8, -1))


def test_every_operation_is_drawn() -> None:
    image = _noise(16, 16, 40, 200)
    seen = {random_operation(image, 0.9, (k + 0.5) / len(OPERATIONS), 0.1).tobytes() for k in range(len(OPERATIONS))}
    assert len(seen) == len(OPERATIONS)
    random_operation(image, 0.9, np.nextafter(1.0, 0.0), 0.0)  # the greatest draw is still an operation


def test_values() -> None:
    image = _noise(40, 30, 50, 151)
    contrast = _apply("auto_contrast", image, 0.5)
    assert contrast.min() == 0 and contrast.max() == 255
    skewed = (_noise(64, 64) // 16) ** 2
    levels = np.unique(_apply("equalize", skewed.astype(np.uint8), 0.5)[..., 0])
    assert levels.min() < 10 and levels.max() == 255 and np.diff(levels).max() < 40
    assert np.array_equal(_apply("posterize", image, 1.0), image & 0xF0)
    assert np.array_equal(_apply("posterize", image, 0.5), image & 0xFC)
    assert np.array_equal(_apply("solarize", image, 1.0), 255 - image.astype(int))
    half = _apply("solarize", image, 0.5)
    assert np.array_equal(half, np.where(image < 128, image, 255 - image.astype(int)))
    assert np.abs(_apply("brightness", image, 1.0, -1) - image * 0.1).max() <= 1
    assert np.abs(_apply("brightness", image, 0.5) - np.minimum(image * 1.45, 255)).max() <= 1
    grey = _apply("color", image, 1.0, -1)
    assert np.ptp(grey, axis=2).max() <= 0.1 * np.ptp(image, axis=2).max() + 1
    flat = _apply("contrast", image, 1.0, -1)
    assert flat.std() < 0.12 * image.std() + 1 and abs(flat.mean() - image.mean()) < 3
    assert _apply("sharpness", image, 1.0, -1)[2:-2, 2:-2].std() < image.std() < _apply("sharpness", image, 1.0).std()


def test_geometry() -> None:
    image = np.zeros((40, 20, 3), np.uint8)
    image[20, 10] = 255
    right, down = _apply("translate_x", image, 0.5, -1), _apply("translate_y", image, 0.5, -1)
    assert right[20, 10 + 4].min() == 255 and down[20 + 9, 10].min() == 255  # 0.45 * 0.5 of the side, whole pixels
    assert _apply("translate_x", image, 0.5, 1)[20, 10 - 4].min() == 255
    bar = np.zeros((41, 41, 3), np.uint8)
    bar[:, 19:22] = 255
    for name in ("rotate", "shear_x"):
        changed = _apply(name, bar, 1.0)[..., 0]
        centres = (changed * np.arange(41)).sum(1) / np.maximum(changed.sum(1), 1)
        slope = np.polyfit(np.arange(10, 31), centres[10:31], 1)[0]
        expected = np.tan(np.radians(30)) if name == "rotate" else 0.3
        assert abs(abs(slope) - expected) < 0.05 and abs(centres[20] - 20) < 1, name  # about the middle
    flat = np.zeros((41, 41, 3), np.uint8)
    flat[19:22] = 255
    changed = _apply("shear_y", flat, 1.0)[..., 0]
    centres = (changed * np.arange(41)[:, None]).sum(0) / np.maximum(changed.sum(0), 1)
    assert abs(abs(np.polyfit(np.arange(10, 31), centres[10:31], 1)[0]) - 0.3) < 0.05


def test_crop_takes_the_part_that_was_drawn() -> None:
    y, x = np.mgrid[0:200, 0:100]
    image = np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    for least in (0.2, 0.6, 0.95):
        shares = []
        for _ in range(60):
            area, aspect, top, left = rng.random(4)
            crop = resized_crop(image, least, area, aspect, top, left).astype(float)
            rows = (crop[150, 50, 0] - crop[50, 50, 0]) * 2
            columns = (crop[100, 75, 1] - crop[100, 25, 1]) * 2
            assert abs(crop[100, 50, 0] - (top * (200 - rows) + rows / 2)) < 3
            assert abs(crop[100, 50, 1] - (left * (100 - columns) + columns / 2)) < 3
            assert 0.72 < (rows / 200) / (columns / 100) < 1.38
            shares.append(rows * columns / 20_000 / (least + area * (1 - least)))
        assert min(shares) > 0.95 and max(shares) < 1.05
    assert np.array_equal(resized_crop(image, 1.0, 0.5, 0.5, 0.3, 0.3), image)


def test_colour_factors() -> None:
    image = _noise(30, 30, 60, 120)
    assert np.array_equal(adjust_colour(image, 1, 1, 1), image)
    assert np.abs(adjust_colour(image, 2, 1, 1).astype(int) - 2 * image.astype(int)).max() <= 1
    assert adjust_colour(image, 1, 0, 1).std() == 0
    assert np.ptp(adjust_colour(image, 1, 1, 0), axis=2).max() == 0
    assert adjust_colour(image, -0.5, 1, 1).max() == 0  # a factor below 0 is 0
