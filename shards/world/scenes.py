"""Generic scenes: counted, coloured things in places, with a coarse caption; the non-person part of the corpus."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.world.captions import MAX_WORDS, PLURAL, Caption, article, describe, listing, say
from shards.world.draws import Draws
from shards.world.identity import ATTRIBUTES, UPPER_COLOURS, make_identity
from shards.world.items import (
    BAGS,
    HATS,
    LOWERS,
    OTHERS,
    SHOES,
    UPPERS,
    Cloth,
    draw_item,
)
from shards.world.moment import make_moment
from shards.world.palette import PALETTE, RGB, shade, tinted
from shards.world.pen import SUPERSAMPLE, Pen
from shards.world.render import VIEWS, Figure

SIZE = 128
PLACES: dict[str, tuple[RGB, RGB]] = {
    "in a shop": ((226, 216, 200), (168, 140, 110)),
    "in a park": ((170, 206, 232), (98, 152, 78)),
    "on a beach": ((150, 206, 240), (228, 208, 156)),
    "in a room": ((206, 214, 206), (150, 108, 76)),
    "on a street": ((176, 182, 190), (110, 110, 114)),
    "in a station": ((150, 156, 166), (132, 130, 132)),
    "in the snow": ((196, 208, 222), (240, 244, 248)),
    "at night": ((26, 28, 56), (52, 52, 62)),
}
"""Caption words, wall or sky, ground."""
_NUMBERS = ("one", "two", "three", "four")
_POSTER_WORDS = 5
"""Longest introduction of a poster: "a poster in the snow"."""
_UNCOLOURED = ("glasses", "sunglasses")


@dataclass(frozen=True)
class Scene:
    """A scene before JPEG and its caption."""

    image: Image.Image
    caption: str
    quality: int

    def jpeg(self) -> bytes:
        """Return the encoded scene."""
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


@dataclass(frozen=True)
class _Thing:
    kind: str
    cloth: Cloth
    colour: str
    pattern: str
    second: str

    def phrase(self, count: int, draws: Draws) -> str:
        """Return words for `count` of this thing."""
        noun = say(self.kind, draws)
        pattern = say(self.pattern, draws) if self.pattern not in ("plain", "two-tone", "sash") else ""
        colour = say(self.colour, draws) if self.kind not in _UNCOLOURED else ""
        if pattern and draws.chance(0.5):
            colour += f" and {say(self.second, draws)}"
        tail = {"two-tone": " with {} lower half", "sash": " with {} sash"}.get(self.pattern, "")
        tail = tail.format(article(say(self.second, draws)))
        words = " ".join(word for word in (colour, pattern, noun) if word)
        if self.kind in PLURAL or self.kind in _UNCOLOURED:
            return words if count == 1 else f"{_NUMBERS[count - 1]} pairs of {words}"
        if count == 1:
            return article(words) + tail
        return f"{_NUMBERS[count - 1]} {_plural(words)}{tail}"


def _plural(words: str) -> str:
    return words[:-1] + "ies" if words.endswith("y") and words[-2] not in "aeiou" else words + "s"


def _thing(draws: Draws, kinds: tuple[str, ...]) -> _Thing:
    kind = draws.pick(kinds)
    colour = draws.pick(UPPER_COLOURS)
    second = draws.pick([other for other in UPPER_COLOURS if other != colour])
    pattern = draws.pick(ATTRIBUTES["pattern"]) if kind in UPPERS and draws.chance(0.6) else "plain"
    tint = (draws.normal(0.6), draws.normal(0.6), draws.normal(0.6))
    return _Thing(kind, (tinted(PALETTE[colour], tint), pattern, PALETTE[second]), colour, pattern, second)


def _background(pen: Pen, draws: Draws, place: str) -> float:
    wall, ground = PLACES[place]
    horizon = draws.uniform(0.5, 0.66)
    pen.rectangle((0, 0, 1.01, horizon), shade(wall, draws.uniform(0.88, 1.1)))
    pen.rectangle((0, horizon, 1.01, 1.01), shade(ground, draws.uniform(0.88, 1.1)))
    if place in ("in a park", "in the snow", "on a street"):
        for _ in range(2):
            x, size = draws.uniform(0.05, 0.95), draws.uniform(0.1, 0.16)
            pen.rectangle((x - 0.015, horizon - 0.2, x + 0.015, horizon + 0.02), (96, 74, 52))
            pen.ellipse((x - size, horizon - 0.2 - 1.4 * size, x + size, horizon - 0.12), (70, 116, 66))
    if place in ("in a room", "in a shop", "in a station"):
        x = draws.uniform(0.05, 0.6)
        pen.rectangle((x, 0.06, x + 0.3, 0.3), shade(wall, 0.72))
    if place == "at night":
        for _ in range(6):
            x, y = draws.uniform(), draws.uniform(0, 0.4)
            pen.rectangle((x, y, x + 0.012, y + 0.012), (240, 236, 190))
    return horizon


def _row(pen: Pen, image: Image.Image, thing: _Thing, count: int, spot: tuple[float, float, float]) -> None:
    """Draw things side by side; spot = (centre x, y of the top, size of one)."""
    x, y, size = spot
    for position in range(count):
        left = x + (position - (count - 1) / 2) * size * 1.08
        draw_item(Pen(image, (left * image.width, y * image.width), size * image.width), thing.kind, thing.cloth)


def _shelf(pen: Pen, y: float) -> None:
    pen.rectangle((0.04, y, 0.96, y + 0.03), (120, 84, 54))
    for x in (0.12, 0.86):
        pen.rectangle((x, y, x + 0.02, y + 0.1), (92, 62, 40))


def _arranged(pen: Pen, image: Image.Image, draws: Draws, horizon: float) -> str:
    """Draw one group of things and return its phrase."""
    thing = _thing(draws, draws.weighted((UPPERS, LOWERS, SHOES, BAGS, HATS, OTHERS), (4, 3, 2, 3, 2, 2)))
    count = draws.weighted((1, 2, 3, 4), (4, 3, 2, 1))
    size = min(draws.uniform(0.28, 0.46), 0.86 / (count * 1.08))
    hanging = thing.kind in UPPERS + LOWERS + ("scarf",)
    if hanging and draws.chance(0.55):
        y = draws.uniform(0.1, 0.28)
        pen.rectangle((0, y, 1.01, y + 0.012), (60, 56, 52))
        _row(pen, image, thing, count, (0.5, y, size))
        return f"{thing.phrase(count, draws)} {draws.pick(('hanging on a line', 'on a line'))}"
    if thing.kind in ("car", "boat", "chair", "ball", "umbrella") or draws.chance(0.3):
        _row(pen, image, thing, count, (0.5, draws.uniform(horizon - 0.1, 0.98 - size), size))
        return f"{thing.phrase(count, draws)}{draws.pick((' on the ground', ''))}"
    if draws.chance(0.5):
        y = draws.uniform(0.46, 0.62)
        _shelf(pen, y)
        _row(pen, image, thing, count, (0.5, y - size * 0.96, size))
        return f"{thing.phrase(count, draws)} on a shelf"
    y = draws.uniform(0.62, 0.74)
    pen.rectangle((0.06, y, 0.94, y + 0.05), (136, 96, 60))
    for x in (0.12, 0.84):
        pen.rectangle((x, y, x + 0.05, min(1.0, y + 0.24)), (104, 72, 46))
    _row(pen, image, thing, count, (0.5, y - size * 0.96, size))
    return f"{thing.phrase(count, draws)} {draws.pick(('on a bench', 'on a table'))}"


def _mannequin(pen: Pen, image: Image.Image, draws: Draws) -> str:
    """Draw a headless mannequin with an upper and a lower garment and return its phrase."""
    upper, lower = _thing(draws, UPPERS), _thing(draws, LOWERS)
    x = draws.uniform(0.3, 0.7)
    unit = float(image.width)
    pen.rectangle((x - 0.012, 0.06, x + 0.012, 0.96), (170, 150, 128))
    pen.ellipse((x - 0.04, 0.02, x + 0.04, 0.12), (200, 180, 156))
    pen.rectangle((x - 0.12, 0.94, x + 0.12, 0.97), (110, 96, 84))
    draw_item(Pen(image, (x * unit, 0.44 * unit), 0.46 * unit), lower.kind, lower.cloth)
    draw_item(Pen(image, (x * unit, 0.11 * unit), 0.46 * unit), upper.kind, upper.cloth)
    clothes = listing([upper.phrase(1, draws), lower.phrase(1, draws)])
    return f"a mannequin {draws.pick(('wearing', 'dressed in', 'with'))} {clothes}"


def _poster(image: Image.Image, draws: Draws, instance: float) -> Caption:
    """Hang a poster of a person, whole or down to the waist, and return the sentence about it."""
    identity = make_identity(int(draws.uniform() * 2**50), "train", 0, 0)
    view = draws.pick(VIEWS)
    moment = make_moment(draws.below(2**50), 0, identity.attributes, 0, 0, instance) if instance else None
    pose = moment.pose if moment else ""
    figure = Figure(moment.shown(identity) if moment else identity, view, draws.uniform(), pose)
    bust = draws.chance(0.4)
    width, height = int(draws.uniform(0.5, 0.6) * image.width), int(draws.uniform(0.76, 0.86) * image.height)
    paper = Image.new("RGB", (width, height), shade(PALETTE[draws.pick(("white", "beige", "gray"))], 0.95))
    size = height * (1.65 if bust else 0.92)
    pen = Pen(paper, (width / 2, height * 0.04), size, flip=draws.chance(0.5))
    boxes = {name: pen.box(box) for name, box in figure.draw(pen).items()}
    if moment:
        boxes["pose"] = pen.box(figure.feet_box)
    # Loose at the sides: an arm or a bag may stand out a little.
    inside = (name for name, box in boxes.items() if box[3] <= height and box[0] > -6 and box[2] < width + 6)
    corner = (int(draws.uniform(0.05, 0.35) * image.width), int(0.05 * image.height))
    rim = image.width // 60
    image.paste((62, 52, 44), (corner[0] - rim, corner[1] - rim, corner[0] + width + rim, corner[1] + height + rim))
    image.paste(paper, corner)
    most = MAX_WORDS - _POSTER_WORDS
    return describe(draws, identity, view, frozenset(inside), 0.5, instance=instance, moment=moment, most_words=most)


def _finish(image: Image.Image, draws: Draws, hardness: float) -> Image.Image:
    """Apply exposure, a light cast and noise of a few grey levels."""
    image = image.reduce(SUPERSAMPLE)
    table: list[int] = []
    light = draws.normal(0.3 * hardness, limit=2.0)
    for _ in range(3):
        gain = 2.0 ** (light + draws.normal(0.15 * hardness, limit=2.0))
        table += [min(255, int(level * gain + 0.5)) for level in range(256)]
    levels = np.asarray(image.point(table), dtype=np.int16)
    # One random row added per line and one per column: grain at a fraction of the cost of noise per pixel.
    side = levels.shape[0]
    grain = np.array([int(draws.uniform(-4, 5)) for _ in range(2 * side)], dtype=np.int16)
    noisy = levels + grain[:side, None, None] * (grain[None, side:, None] & 1)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def make_scene(draws: Draws, hardness: float, posters: float = 0.0, instance: float = 0.0) -> Scene:
    """Return one scene, decided by the arguments alone.

    Args:
        draws: Stream of the scene.
        hardness: Strength of its photometric disturbances.
        posters: Probability that it shows a poster of a person, with all words that sentences about people use.
        instance: Strength of instance-level content of the posters.
    """
    side = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side))
    pen = Pen(image, (0.0, 0.0), float(side))
    place = draws.pick(list(PLACES))
    horizon = _background(pen, draws, place)
    if posters and draws.chance(posters):
        kind = draws.pick(("a poster", "a painting", "a photo"))
        caption = f"{kind} {place}. {_poster(image, draws, instance).text}"
        return Scene(_finish(image, draws, hardness), caption, 80 + draws.below(15))
    phrase = _mannequin(pen, image, draws) if draws.chance(0.25) else _arranged(pen, image, draws, horizon)
    frame = draws.pick(("{} {}.", "a picture of {} {}.", "there is {} {}.", "we see {} {}.", "{} can be seen {}."))
    caption = frame.format(phrase, place)
    if caption.startswith("there is") and phrase.split()[0] in _NUMBERS:
        caption = caption.replace("there is", "there are", 1)
    return Scene(_finish(image, draws, hardness), caption, 80 + draws.below(15))
