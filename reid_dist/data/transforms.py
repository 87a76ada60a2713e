"""Decoding and augmentation of images as uint8 arrays of shape (height, width, 3)."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from reid_dist.data.sample import MAX_IMAGE_BYTES, MAX_PIXELS
from reid_dist.errors import UserError

Pixels = npt.NDArray[np.uint8]

# An allow-list: Pillow would otherwise try every format plug-in on bytes that come from outside.
_FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(data: bytes, size: tuple[int, int], name: str) -> Pixels:
    """Decode an image file and resize it with antialiasing (bicubic).

    JPEG is scaled down inside the decoder first (`draft`), never below the size asked for. EXIF orientation is not
    read: it was applied when the shard was written.

    Args:
        data: the file, at most 20 MB and 4 million pixels.
        size: (height, width) of the result.
        name: what the error message calls the image.

    Returns:
        RGB. Shape: (height, width, 3).

    Raises:
        UserError: the image does not decode or is above a cap.
    """
    height, width = size
    if len(data) > MAX_IMAGE_BYTES:
        raise UserError(f"{name}: {len(data)} bytes, more than the cap of {MAX_IMAGE_BYTES}; shrink the image")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            image.draft("RGB", (width, height))
            image = image.convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise OSError, but also SyntaxError, struct.error, ...
        raise UserError(
            f"{name}: the image does not decode ({error}); replace or remove it and write the shards again"
        ) from None
    if pixels > MAX_PIXELS:
        raise UserError(f"{name}: {pixels} pixels, more than the cap of {MAX_PIXELS}; shrink the image")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


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
    """Random changes of a training image, in this order: flip, shift, jitter, erase.

    Attributes:
        flip: probability of mirroring.
        pad: pixels of black border from which a crop of the old size is cut, that is a shift of at most `pad`.
        erase: probability of erasing one rectangle.
        erase_area: least and greatest share of the image that the rectangle takes.
        jitter: each channel is multiplied by a factor drawn from 1 ± jitter.
    """

    flip: float = 0.5
    pad: int = 0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.4)
    jitter: float = 0.0

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
        flip, row, column, red, green, blue, erase, area, aspect, top, left = rng.random(11).tolist()
        image = image_HWC[:, ::-1] if flip < self.flip else image_HWC
        if self.pad:
            shifts = 2 * self.pad + 1
            image = _shift(image, int(row * shifts) - self.pad, int(column * shifts) - self.pad)
        if self.jitter:
            gain = np.array([red, green, blue], dtype=np.float32) * (2 * self.jitter) + (1 - self.jitter)
            image = np.minimum(image * gain, np.float32(255)).astype(np.uint8)
        if erase < self.erase:
            image = self._erase(image, area, aspect, top, left, rng)
        return image

    def _erase(
        self, image: Pixels, area: float, aspect: float, top: float, left: float, rng: np.random.Generator
    ) -> Pixels:
        """Overwrite a rectangle with noise (arguments uniform in [0, 1)).

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
