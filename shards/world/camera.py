"""The cameras of a world, six unless told otherwise: fixed scene and optics, and the picture that one makes."""

import io
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from shards.world.backdrop import PANORAMA, PLACES, draw_backdrop
from shards.world.draws import Draws
from shards.world.identity import Identity, make_identity
from shards.world.moment import Moment
from shards.world.palette import RGB
from shards.world.pen import SUPERSAMPLE, Box, Pen
from shards.world.render import VIEWS, Figure

CAMERAS = 6
MIN_HEIGHT, MAX_HEIGHT = 56, 256
_CAMERA, _NOISE, _IMAGE, _PASSER = 201, 202, 203, 204
_VISIBLE = 0.62
"""Share of an attribute's box that must be free before a caption may name it."""
_OBSTACLES: tuple[RGB, ...] = ((92, 92, 96), (150, 152, 150), (120, 84, 56), (70, 96, 76), (164, 120, 60))


@dataclass(frozen=True)
class Camera:
    """What is fixed about a camera.

    Attributes:
        number: 0-based camera number.
        force: Factor of every disturbance, also those per image.
        height: Nominal height of its crops in pixels.
        cast: Per channel exponent of the colour cast (natural logarithm of the channel gain).
        gain: Logarithm of the exposure.
        gamma: Exponent of the tone curve.
        saturation: 1 keeps colours, 0 is grey.
        haze: Grey level added to black (0..1).
        blur: Radius in pixels for a crop of 128 pixels height.
        noise: Standard deviation in grey levels.
        quality: JPEG quality.
        views: Prior of front, side, back.
    """

    number: int
    force: float
    height: int
    cast: tuple[float, float, float]
    gain: float
    gamma: float
    saturation: float
    haze: float
    blur: float
    noise: float
    quality: int
    views: tuple[float, float, float]


@dataclass(frozen=True)
class Picture:
    """A rendered crop.

    Attributes:
        image: Pixels before JPEG.
        quality: JPEG quality.
        view: front, side or back.
        visible: Attributes that can be seen; "pose" is among them where there is a moment and the feet are free.
        moment: What holds for this picture only; None in worlds without instance-level content.
    """

    image: Image.Image
    quality: int
    view: str
    visible: frozenset[str]
    moment: Moment | None = None

    def jpeg(self) -> bytes:
        """Return the encoded picture."""
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def strength(hardness: float) -> float:
    """Return the factor of all disturbances: it levels off, so that skin stays skin at hardness 1 and above."""
    return hardness / (1.0 + hardness)


@lru_cache(maxsize=64)
def _slots(world_seed: int, cameras: int, parameter: int) -> tuple[int, ...]:
    return tuple(Draws(world_seed, _CAMERA, cameras, parameter).shuffled(range(cameras)))


@lru_cache(maxsize=128)
def make_camera(world_seed: int, number: int, hardness: float, cameras: int = CAMERAS) -> Camera:
    """Return one camera of a world; it is the same for every split.

    Parameters are stratified over the cameras (of six, each takes another sixth of the range), so that worlds of
    different seeds are about equally hard.

    Args:
        world_seed: Seed of the world.
        number: 0-based camera number.
        hardness: Strength of camera effects and disturbances.
        cameras: How many cameras the world has.
    """
    draws = Draws(world_seed, _CAMERA, number)
    force = strength(hardness)

    def level(parameter: int) -> float:
        return (_slots(world_seed, cameras, parameter)[number] + draws.uniform()) / cameras

    hue, amount = 2 * math.pi * level(0), 0.52 * force * (0.5 + level(1))
    third = 2 * math.pi / 3
    views = [-math.log(1.0 - draws.uniform()) + 0.7 for _ in VIEWS]
    total = sum(views)
    return Camera(
        number=number,
        force=force,
        height=round(math.exp(math.log(76) + level(2) * math.log(200 / 76))),
        cast=(amount * math.cos(hue), amount * math.cos(hue - third), amount * math.cos(hue + third)),
        gain=1.9 * force * (level(3) - 0.5),
        gamma=math.exp(1.4 * force * (level(4) - 0.5)),
        saturation=1.0 - 0.8 * force * level(5),
        haze=0.3 * force * level(6),
        blur=force * (0.2 + 1.4 * level(7)),
        noise=force * (4.0 + 12.0 * level(8)),
        quality=round(92 - 40 * min(1.0, 2 * force) * level(9)),
        views=(views[0] / total, views[1] / total, views[2] / total),
    )


@lru_cache(maxsize=64)
def _panorama(world_seed: int, number: int, height: int) -> Image.Image:
    draws = Draws(world_seed, _CAMERA, number, 1)
    return draw_backdrop(draws, PLACES[number % len(PLACES)], height * SUPERSAMPLE)


@lru_cache(maxsize=1)
def _noise_bank() -> "np.ndarray[tuple[int, ...], np.dtype[np.int16]]":
    """Return standard normal noise shared by all pictures, int16 in 1/64 units; a fresh draw per pixel costs more."""
    side = 400
    generator = np.random.Generator(np.random.PCG64(_NOISE))
    uniform = generator.random((12, side, side, 3), dtype=np.float32)
    bank: np.ndarray[tuple[int, ...], np.dtype[np.int16]] = np.round((uniform.sum(axis=0) - 6.0) * 64).astype(np.int16)
    return bank


def _crop(world_seed: int, camera: Camera, draws: Draws) -> tuple[Image.Image, int]:
    """Return the supersampled background of one picture and the picture's height in pixels."""
    height = max(MIN_HEIGHT, min(MAX_HEIGHT, round(camera.height * draws.uniform(0.85, 1.18))))
    height -= height % 2
    panorama = _panorama(world_seed, camera.number, camera.height)
    tall = panorama.height * draws.uniform(0.86, 1.0)
    left = draws.uniform(0, PANORAMA * panorama.height - tall / 2)
    top = draws.uniform(0, panorama.height - tall)
    size = (height // 2 * SUPERSAMPLE, height * SUPERSAMPLE)
    box = (left, top, left + tall / 2, top + tall)
    return panorama.resize(size, Image.Resampling.BILINEAR, box=box), height


def _occlude(world_seed: int, force: float, image: Image.Image, draws: Draws, feet: float) -> Box | None:
    """Draw a pole, a low wall or a passer-by before the person; return the covered box in pixels."""
    if not draws.chance(0.65 * force):
        return None
    height = image.height
    pen = Pen(image, (0.0, 0.0), float(height))
    kind = draws.weighted(("pole", "wall", "passer-by"), (0.4, 0.3, 0.3))
    if kind == "pole":
        x, thick = draws.uniform(0.06, 0.44), draws.uniform(0.03, 0.06)
        pen.rectangle((x - thick / 2, 0, x + thick / 2, 1.01), draws.pick(_OBSTACLES))
        return pen.box((x - thick / 2, 0, x + thick / 2, 1))
    if kind == "wall":
        top = draws.uniform(0.7, 0.88)
        colour = draws.pick(_OBSTACLES)
        pen.rectangle((0, top, 0.51, 1.01), colour)
        pen.rectangle((0, top, 0.51, top + 0.015), (205, 205, 200))
        return pen.box((0, top, 0.5, 1))
    side = draws.chance(0.5)
    size = draws.uniform(0.86, 1.0)
    person = make_identity(world_seed + _PASSER, "distractor", draws.below(5000), 0)
    figure = Figure(person, draws.pick(VIEWS), draws.uniform())
    x = draws.uniform(0.0, 0.06) if side else draws.uniform(0.44, 0.5)
    passer = Pen(image, (x * height, feet + 0.02 * height - size * height), size * height, draws.chance(0.5))
    figure.draw(passer)
    return passer.box((-0.15, 0.0, 0.15, 1.0))


def _free_share(box: Box, frame: Box, hidden: Box | None) -> float:
    """Return the share of a box that lies in the frame and is not covered."""

    def overlap(a: Box, b: Box) -> float:
        return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    area = (box[2] - box[0]) * (box[3] - box[1])
    inside = (max(box[0], frame[0]), max(box[1], frame[1]), min(box[2], frame[2]), min(box[3], frame[3]))
    free = overlap(box, frame) - (overlap(inside, hidden) if hidden else 0.0)
    return free / area if area > 0 else 0.0


def _expose(image: Image.Image, camera: Camera, draws: Draws) -> Image.Image:
    """Apply colour cast, exposure, tone curve, saturation, haze, blur and noise; everything fixed or drawn once."""
    image = image.convert("RGB", _saturation_matrix(camera.saturation))
    light = camera.gain + draws.normal(0.48 * camera.force, limit=2.0)
    table: list[int] = []
    for channel in range(3):
        gain = math.exp(light + camera.cast[channel] + draws.normal(0.23 * camera.force, limit=2.0))
        bright = camera.haze + (1.0 - camera.haze) * np.minimum(1.0, gain * _tone_curve(camera.gamma))
        table += (255 * bright + 0.5).astype(np.uint8).tolist()
    image = image.point(table)
    radius = camera.blur * image.height / 128 * draws.uniform(0.7, 1.3)
    if radius > 0.2:
        image = image.filter(ImageFilter.BoxBlur(radius))
    bank = _noise_bank()
    width, height = image.size
    y, x = draws.below(bank.shape[0] - height), draws.below(bank.shape[1] - width)
    strength = round(camera.noise * 16)
    noisy = np.asarray(image, dtype=np.int16) + ((bank[y : y + height, x : x + width] * np.int16(strength)) >> 10)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@lru_cache(maxsize=128)
def _tone_curve(gamma: float) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    # Python's power, not numpy's: its last bit may differ between processors' vector code, and pictures are pinned.
    return np.array([(level / 255) ** gamma for level in range(256)])


def _saturation_matrix(keep: float) -> tuple[float, ...]:
    weights = (0.299, 0.587, 0.114)
    rows: list[float] = []
    for channel in range(3):
        rows += [weight * (1 - keep) + (keep if column == channel else 0.0) for column, weight in enumerate(weights)]
        rows.append(0.0)
    return tuple(rows)


def render(
    world_seed: int,
    identity: Identity,
    camera: int,
    k: int,
    hardness: float,
    cameras: int = CAMERAS,
    moment: Moment | None = None,
) -> Picture:
    """Return the picture of an identity by a camera; it depends on nothing but the arguments.

    Args:
        world_seed: Seed of the world.
        identity: Whom.
        camera: 0-based camera number.
        k: Which of the pictures of this identity by this camera.
        hardness: Strength of camera effects and disturbances; 0 is a clean studio.
        cameras: How many cameras the world has.
        moment: Pose and bag of this picture; without one the pose means nothing and the bag is the identity's.
    """
    lens = make_camera(world_seed, camera, hardness, cameras)
    draws = Draws(world_seed, identity.key, camera, k)
    view = draws.weighted(VIEWS, lens.views)
    image, height = _crop(world_seed, lens, draws)
    scale = height * SUPERSAMPLE
    shake = min(2.0, 4.0 * lens.force)
    size = (0.9 + draws.uniform(-0.05, 0.05) * shake) * scale
    feet = (0.965 + draws.uniform(-0.02, 0.025) * shake) * scale
    x = (0.25 + draws.uniform(-0.035, 0.035) * shake) * scale
    if identity.split == "junk":
        x, size, feet = x + draws.pick((-0.24, 0.24)) * scale, size * 1.5, feet + 0.4 * scale
    gait = draws.uniform()
    figure = Figure(moment.shown(identity), view, gait, moment.pose) if moment else Figure(identity, view, gait)
    pen = Pen(image, (x, feet - size), size, flip=draws.chance(0.5))
    boxes = figure.draw(pen)
    if moment:
        boxes["pose"] = figure.feet_box
    hidden = _occlude(world_seed, lens.force, image, draws, feet)
    frame = (0.0, 0.0, float(image.width), float(image.height))
    visible = frozenset(name for name, box in boxes.items() if _free_share(pen.box(box), frame, hidden) >= _VISIBLE)
    image = _expose(image.reduce(SUPERSAMPLE), lens, draws)
    return Picture(image, lens.quality, view, visible, moment)
