"""Decoding and augmentation of images as uint8 arrays of shape (height, width, 3)."""

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, UnidentifiedImageError, features

from reid_dist.data.image_ops import adjust_colour, random_operation, resized_crop
from reid_dist.data.sample import MAX_IMAGE_BYTES, MAX_PIXELS
from reid_dist.errors import UserError

Pixels = npt.NDArray[np.uint8]

# An allow-list: Pillow would otherwise try every format plug-in on bytes that come from outside.
_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_START = b"\xff\xd8\xff"
# What libjpeg turns into RGB by itself; Pillow converts the others (CMYK, YCCK).
_JPEG_COLOURS = ("YCbCr", "RGB", "Gray")
# Numbers drawn for an image: always; for crop (4) and colour (3); for each operation.
_BASE_DRAWS = 11
_EXTRA_DRAWS = 7
_OPERATION_DRAWS = 2


def decode_image(data: bytes, size: tuple[int, int], name: str) -> Pixels:
    """Decode an image file and resize it with antialiasing (bicubic).

    See `decode_into`.

    Args:
        data: the file, at most 20 MB and 4 million pixels.
        size: (height, width) of the result.
        name: what the error message calls the image.

    Returns:
        RGB. Shape: (height, width, 3).

    Raises:
        UserError: the image does not decode or is above a cap.
    """
    image_HWC: Pixels = np.empty((*size, 3), dtype=np.uint8)
    decode_into(data, image_HWC, name)
    return image_HWC


def decode_into(data: bytes, out_HWC: Pixels, name: str) -> None:
    """Decode an image file straight into a place of a batch, resized with antialiasing (bicubic).

    JPEG is scaled down by 2, 4 or 8 inside the decoder first, never below the size asked for. It is decoded by
    simplejpeg where that is installed and by Pillow otherwise; both run libjpeg-turbo with the same settings and give
    the same pixels where their libraries have the same version. What simplejpeg refuses is handed to Pillow, which
    alone decides what is damaged. EXIF orientation is not read: it was applied when the shard was written.

    Args:
        data: the file, at most 20 MB and 4 million pixels.
        out_HWC: RGB goes here; contiguous. Its content is undefined after an error. Shape: (height, width, 3).
        name: what the error message calls the image.

    Raises:
        UserError: the image does not decode or is above a cap.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise UserError(f"{name}: {len(data)} bytes, more than the cap of {MAX_IMAGE_BYTES}; shrink the image")
    if data.startswith(_JPEG_START):
        fast = _simplejpeg()
        if fast is not None and _decode_fast(fast, data, out_HWC, name):
            return
    height, width = out_HWC.shape[:2]
    out_HWC[...] = np.asarray(_decode_pillow(data, (height, width), name))


def decoder_name() -> str:
    """What decodes and resizes here, for records of a run: other decoders give slightly other pixels."""
    fast = _simplejpeg()
    pillow = f"pillow {PIL.__version__}"
    decoder = f"{pillow}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if fast is not None:
        decoder = f"simplejpeg {fast.__version__}"
    return f"{decoder}; resize {pillow} bicubic"


@functools.cache
def _simplejpeg() -> Any:
    """The optional decoder (extra `fast`), or None."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_fast(fast: Any, data: bytes, out_HWC: Pixels, name: str) -> bool:
    """Whether simplejpeg decoded the image."""
    try:
        rows, columns, colour, _ = fast.decode_jpeg_header(data)
        _check_pixels(rows * columns, name)
        if colour not in _JPEG_COLOURS:
            return False
        height, width = out_HWC.shape[:2]
        shrink = min(rows // height, columns // width, 8)
        shrink = 1 << shrink.bit_length() - 1 if shrink > 1 else 1  # 8, 4, 2 or 1
        scaled = (-(-rows // shrink), -(-columns // shrink))
        image_HWC = out_HWC if scaled == (height, width) else np.empty((*scaled, 3), dtype=np.uint8)
        least = scaled if shrink > 1 else (0, 0)
        found = fast.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], buffer=image_HWC)
    except ValueError:
        return False
    if found.shape != image_HWC.shape:
        return False
    if image_HWC is not out_HWC:
        out_HWC[...] = np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC))
    return True


def _decode_pillow(data: bytes, size: tuple[int, int], name: str) -> Image.Image:
    height, width = size
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            image.draft("RGB", (width, height))
            image = image.convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise OSError, but also SyntaxError, struct.error, ...
        # What Pillow says of a foreign format is only where in memory the bytes are.
        reason = "not JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(
            f"{name}: the image does not decode ({reason}); replace or remove it and write the shards again"
        ) from None
    _check_pixels(pixels, name)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image


def _check_pixels(pixels: int, name: str) -> None:
    if pixels > MAX_PIXELS:
        raise UserError(f"{name}: {pixels} pixels, more than the cap of {MAX_PIXELS}; shrink the image")


def sample_rng(seed: int, epoch: int, row: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whatever the rank, worker or step that asks for them.

    Philox with an explicit key and counter: 8 µs, a third less than hashing a SeedSequence. The counter's first word
    is left to the generator, so streams cannot overlap within 2**64 draws.

    Args:
        seed: not negative, below 2**64.
        epoch: not negative.
        row: number of the sample, not negative.
        stream: separates uses of the same sample.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, row, stream, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image, in this order: crop, flip, shift, operations, colour, jitter, erase.

    Attributes:
        flip: probability of mirroring.
        pad: pixels of black border from which a crop of the old size is cut, that is a shift of at most `pad`.
        erase: probability of erasing one rectangle.
        erase_area: least and greatest share of the image that the rectangle takes.
        jitter: each channel is multiplied by a factor drawn from 1 ± jitter.
        color: brightness, contrast and saturation are each multiplied by a factor drawn from 1 ± color.
        rand_ops: number of operations drawn from `image_ops.OPERATIONS` ("RandAugment", Cubuk et al., 2020).
        rand_magnitude: how strong they are, 0 to 1.
        crop: least share of the area that a random crop takes, which is then resized to the old size; 1 is off.
        erase_fill: colour of the erased rectangle, (red, green, blue) in 0..255; None: noise.
    """

    flip: float = 0.5
    pad: int = 0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.4)
    jitter: float = 0.0
    color: float = 0.0
    rand_ops: int = 0
    rand_magnitude: float = 0.3
    crop: float = 1.0
    erase_fill: tuple[int, int, int] | None = None

    def __call__(self, image_HWC: Pixels, rng: np.random.Generator) -> Pixels:
        """Augment one image.

        Args:
            image_HWC: not changed. Shape: (height, width, 3).
            rng: see `sample_rng`. The same number of draws is made whatever happens to the image, except inside the
                rectangle, which comes last.

        Returns:
            uint8 image of the same shape; it may be a view of the input when nothing but a flip happened.
        """
        # One draw for all decisions: a call costs more than the numbers.
        flip, row, column, red, green, blue, erase, area, aspect, top, left = rng.random(_BASE_DRAWS).tolist()
        extra = self._extra_draws(rng)
        image = resized_crop(image_HWC, self.crop, *extra[:4]) if self.crop < 1 else image_HWC
        if flip < self.flip:
            image = image[:, ::-1]
        if self.pad:
            shifts = 2 * self.pad + 1
            image = _shift(image, int(row * shifts) - self.pad, int(column * shifts) - self.pad)
        for first in range(_EXTRA_DRAWS, len(extra), _OPERATION_DRAWS):
            image = random_operation(image, self.rand_magnitude, *extra[first : first + _OPERATION_DRAWS])
        if self.color:
            image = adjust_colour(image, *(1 + self.color * (2 * draw - 1) for draw in extra[4:7]))
        if self.jitter:
            gain = np.array([red, green, blue], dtype=np.float32) * (2 * self.jitter) + (1 - self.jitter)
            image = np.minimum(image * gain, np.float32(255)).astype(np.uint8)
        if erase < self.erase:
            image = self._erase(image, area, aspect, top, left, rng)
        return image

    def _extra_draws(self, rng: np.random.Generator) -> list[float]:
        """For crop, colour and operations; none where all of them are off, so that older runs stay what they were."""
        if self.crop >= 1 and not self.color and not self.rand_ops:
            return []
        draws: list[float] = rng.random(_EXTRA_DRAWS + _OPERATION_DRAWS * self.rand_ops).tolist()
        return draws

    def _erase(
        self, image: Pixels, area: float, aspect: float, top: float, left: float, rng: np.random.Generator
    ) -> Pixels:
        """Overwrite a rectangle with noise, or with one colour (arguments uniform in [0, 1)).

        Noise, not the mean colour: a flat patch is itself a constant object that the network can learn to find, and
        random values did best in "Random Erasing Data Augmentation" (Zhong et al., 2020), section 4.
        """
        height, width = image.shape[:2]
        least, greatest = self.erase_area
        pixels = (least + area * (greatest - least)) * height * width
        # Height over width in [0.3, 1 / 0.3], uniform in the logarithm.
        ratio = 0.3 ** (1 - 2 * aspect)
        rows = min(height, max(1, round((pixels * ratio) ** 0.5)))
        columns = min(width, max(1, round((pixels / ratio) ** 0.5)))
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        result: Pixels = image.copy()
        if self.erase_fill is not None:
            result[y : y + rows, x : x + columns] = self.erase_fill
            return result
        noise = np.frombuffer(rng.bytes(rows * columns * 3), dtype=np.uint8)
        result[y : y + rows, x : x + columns] = noise.reshape(rows, columns, 3)
        return result


def _shift(image: Pixels, down: int, right: int) -> Pixels:
    """Move the picture by whole pixels; what comes in from outside is black."""
    height, width = image.shape[:2]
    result: Pixels = np.zeros_like(image, order="C")
    result[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return result
