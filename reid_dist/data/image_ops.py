"""Changes of one uint8 RGB image, shape (height, width, 3): what `transforms.Augment` draws from.

Every function takes its random numbers as arguments, uniform in [0, 1), and returns a new array.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

_Pixels = npt.NDArray[np.uint8]
# Takes the image, the magnitude in [0, 1] and a sign.
Operation = Callable[[Image.Image, float, int], Image.Image]

# Height over width of a crop, relative to that of the image; the usual choice.
_ASPECT = 4 / 3
# Changes at magnitude 1, as in the RandAugment paper's code: factors 1 ± 0.9, degrees, slope, share of the side.
_ENHANCE, _ROTATE, _SHEAR, _TRANSLATE = 0.9, 30.0, 0.3, 0.45


def resized_crop(image_HWC: _Pixels, least: float, area: float, aspect: float, top: float, left: float) -> _Pixels:
    """Cut out a random part and resize it to the old size (bicubic).

    Args:
        image_HWC: not changed.
        least: smallest share of the area, above 0; shares are uniform between it and 1.
        area: draws the share.
        aspect: draws height over width, 3/4 to 4/3 of the image's own (less where a side would leave the image),
            uniform in the logarithm.
        top: draws the vertical place.
        left: draws the horizontal place.
    """
    height, width = image_HWC.shape[:2]
    share = least + area * (1 - least)
    # Each side takes the square root of the share and of the ratio.
    stretch = min(_ASPECT, 1 / share) ** (aspect - 0.5)
    rows, columns = share**0.5 * stretch * height, share**0.5 / stretch * width
    y, x = top * (height - rows), left * (width - columns)
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    return _pixels(image.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + columns, y + rows)))


def adjust_colour(image_HWC: _Pixels, brightness: float, contrast: float, saturation: float) -> _Pixels:
    """Multiply brightness, the distance from the mean grey and the distance from the own grey, in this order."""
    image = _image(image_HWC)
    image = ImageEnhance.Brightness(image).enhance(max(0.0, brightness))
    image = ImageEnhance.Contrast(image).enhance(max(0.0, contrast))
    return _pixels(ImageEnhance.Color(image).enhance(max(0.0, saturation)))


def random_operation(image_HWC: _Pixels, magnitude: float, choice: float, sign: float) -> _Pixels:
    """Apply one of OPERATIONS.

    Args:
        image_HWC: not changed.
        magnitude: 0 to 1.
        choice: draws the operation, all alike.
        sign: draws the direction of those that have one.
    """
    operation = list(OPERATIONS.values())[int(choice * len(OPERATIONS))]
    return _pixels(operation(_image(image_HWC), magnitude, 1 if sign < 0.5 else -1))


def _image(image_HWC: _Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_HWC))


def _pixels(image: Image.Image) -> _Pixels:
    pixels: _Pixels = np.array(image)
    return pixels


def _auto_contrast(image: Image.Image, _: float, __: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _: float, __: int) -> Image.Image:
    return ImageOps.equalize(image)


def _posterize(image: Image.Image, magnitude: float, _: int) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * magnitude))


def _solarize(image: Image.Image, magnitude: float, _: int) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - magnitude)))


def _color(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 + sign * _ENHANCE * magnitude)


def _contrast(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 + sign * _ENHANCE * magnitude)


def _brightness(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + sign * _ENHANCE * magnitude)


def _sharpness(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + sign * _ENHANCE * magnitude)


def _rotate(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return image.rotate(sign * _ROTATE * magnitude, Image.Resampling.BILINEAR)


def _shear_x(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    slope = sign * _SHEAR * magnitude
    return _affine(image, (1, slope, -slope * image.height / 2, 0, 1, 0))


def _shear_y(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    slope = sign * _SHEAR * magnitude
    return _affine(image, (1, 0, 0, slope, 1, -slope * image.width / 2))


def _translate_x(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, sign * math.floor(_TRANSLATE * magnitude * image.width), 0, 1, 0))


def _translate_y(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * math.floor(_TRANSLATE * magnitude * image.height)))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The point (x, y) of the result is that of the image at (a x + b y + c, d x + e y + f); black outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
