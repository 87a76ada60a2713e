"""Backgrounds of the cameras: six kinds of places, drawn once per camera as a panorama."""

from PIL import Image

from shards.world.draws import Draws
from shards.world.palette import RGB, shade
from shards.world.pen import Pen

PANORAMA = 2.0
"""Width of a panorama in picture heights."""
PLACES = ("shops", "park", "corridor", "square", "station", "car park")
_WALLS: tuple[RGB, ...] = (
    (178, 160, 142), (150, 132, 124), (196, 190, 178), (136, 144, 150), (168, 120, 100), (120, 128, 112),
)  # fmt: skip
_CARS: tuple[RGB, ...] = ((160, 40, 44), (52, 80, 140), (190, 190, 188), (60, 62, 66), (196, 160, 60))


def draw_backdrop(draws: Draws, kind: str, height: int) -> Image.Image:
    """Return a panorama of one place.

    Args:
        draws: Stream of the camera.
        kind: One of PLACES.
        height: Height in (supersampled) pixels.
    """
    image = Image.new("RGB", (int(height * PANORAMA), height), shade(draws.pick(_WALLS), draws.uniform(0.8, 1.1)))
    pen = Pen(image, (0.0, 0.0), float(height))
    horizon = draws.uniform(0.5, 0.66)
    paint = {
        "shops": _shops,
        "park": _park,
        "corridor": _corridor,
        "square": _square,
        "station": _station,
        "car park": _cars,
    }[kind]
    paint(pen, draws, horizon)
    return image


def _ground(pen: Pen, draws: Draws, horizon: float, colour: RGB, joint: RGB) -> None:
    pen.rectangle((0, horizon, PANORAMA, 1.01), colour)
    for row in range(1, 5):
        y = horizon + (1 - horizon) * (row / 5) ** 1.4
        pen.rectangle((0, y, PANORAMA, y + 0.006), joint)
    x = draws.uniform(0, 0.3)
    while x < PANORAMA + 0.4:
        pen.line([(0.3 + x * 0.7, horizon), (x * 1.3 - 0.3, 1.0)], 0.006, joint)
        x += 0.34


def _shops(pen: Pen, draws: Draws, horizon: float) -> None:
    x = 0.0
    while x < PANORAMA:
        width = draws.uniform(0.4, 0.7)
        wall = shade(draws.pick(_WALLS), draws.uniform(0.75, 1.1))
        pen.rectangle((x, 0, x + width, horizon), wall)
        pen.rectangle((x + 0.05, 0.22, x + width * 0.6, horizon - 0.06), (92, 112, 126))
        pen.polygon([(x + 0.05, 0.22), (x + width * 0.35, 0.22), (x + 0.05, 0.4)], (130, 150, 162))
        pen.rectangle((x + width * 0.68, 0.2, x + width * 0.92, horizon), shade(wall, 0.55))
        pen.rectangle((x, 0.1, x + width, 0.18), draws.pick(_CARS))
        x += width
    _ground(pen, draws, horizon, (150, 148, 146), (124, 122, 120))
    pen.rectangle((0, 0.93, PANORAMA, 0.96), (112, 110, 110))


def _park(pen: Pen, draws: Draws, horizon: float) -> None:
    pen.rectangle((0, 0, PANORAMA, horizon), (168, 196, 214))
    pen.rectangle((0, horizon - 0.12, PANORAMA, horizon + 0.02), (86, 120, 78))
    x = draws.uniform(0, 0.2)
    while x < PANORAMA:
        pen.rectangle((x - 0.03, 0.2, x + 0.03, horizon + 0.03), (96, 74, 52))
        size = draws.uniform(0.14, 0.22)
        pen.ellipse(
            (x - size, 0.02, x + size, 0.02 + 1.7 * size),
            draws.pick(((70, 108, 62), (92, 128, 70), (110, 132, 66))),
        )
        x += draws.uniform(0.35, 0.6)
    pen.rectangle((0, horizon, PANORAMA, 1.01), (116, 140, 84))
    pen.polygon([(0, 0.8), (PANORAMA, 0.74), (PANORAMA, 0.98), (0, 1.0)], (184, 168, 138))


def _corridor(pen: Pen, draws: Draws, horizon: float) -> None:
    pen.rectangle((0, 0, PANORAMA, horizon), draws.pick(((196, 196, 186), (176, 188, 186), (200, 186, 166))))
    pen.rectangle((0, 0, PANORAMA, 0.07), (226, 226, 220))
    x = draws.uniform(0, 0.2)
    door = draws.pick(((132, 96, 66), (84, 100, 120), (120, 60, 56)))
    while x < PANORAMA:
        pen.rectangle((x, 0.16, x + 0.24, horizon), door)
        pen.rectangle((x + 0.08, 0.22, x + 0.16, 0.34), (186, 200, 206))
        pen.rectangle((x + 0.32, 0.24, x + 0.48, 0.4), draws.pick(_CARS))
        x += 0.62
    pen.rectangle((0, horizon - 0.03, PANORAMA, horizon), (110, 108, 104))
    _ground(pen, draws, horizon, (158, 152, 142), (136, 130, 122))


def _square(pen: Pen, draws: Draws, horizon: float) -> None:
    pen.rectangle((0, 0, PANORAMA, horizon), (186, 202, 216))
    x = 0.0
    while x < PANORAMA:
        width, top = draws.uniform(0.25, 0.5), draws.uniform(0.02, 0.22)
        wall = draws.pick(_WALLS)
        pen.rectangle((x, top, x + width, horizon), wall)
        for row in range(3):
            for column in range(int(width / 0.11)):
                left, up = x + 0.03 + column * 0.11, top + 0.04 + row * 0.12
                pen.rectangle((left, up, left + 0.055, up + 0.07), shade(wall, 0.55))
        x += width + draws.uniform(0, 0.08)
    _ground(pen, draws, horizon, (176, 166, 156), (150, 140, 132))


def _station(pen: Pen, draws: Draws, horizon: float) -> None:
    stripe = draws.pick(_CARS)
    pen.rectangle((0, 0, PANORAMA, horizon), (92, 96, 104))
    pen.rectangle((0, 0.12, PANORAMA, horizon - 0.04), (206, 208, 210))
    pen.rectangle((0, horizon - 0.14, PANORAMA, horizon - 0.09), stripe)
    x = draws.uniform(0, 0.2)
    while x < PANORAMA:
        pen.rectangle((x, 0.18, x + 0.22, 0.36), (58, 72, 84))
        pen.rectangle((x + 0.3, 0.16, x + 0.42, horizon - 0.05), (168, 172, 176))
        x += 0.52
    pen.rectangle((0, horizon, PANORAMA, 1.01), (124, 122, 124))
    pen.rectangle((0, horizon + 0.04, PANORAMA, horizon + 0.07), (206, 184, 70))


def _cars(pen: Pen, draws: Draws, horizon: float) -> None:
    pen.rectangle((0, 0, PANORAMA, horizon), draws.pick(((150, 150, 148), (128, 124, 120))))
    pen.rectangle((0, 0, PANORAMA, 0.12), (104, 102, 100))
    pen.rectangle((0, horizon - 0.05, PANORAMA, 1.01), (104, 106, 110))
    x = draws.uniform(-0.1, 0.1)
    while x < PANORAMA:
        colour, y = draws.pick(_CARS), horizon - 0.03
        pen.polygon(
            [(x + 0.1, y - 0.02), (x + 0.18, y - 0.13), (x + 0.42, y - 0.13), (x + 0.5, y - 0.02)],
            (78, 94, 106),
        )
        pen.rectangle((x, y - 0.03, x + 0.58, y + 0.1), colour)
        for wheel in (0.12, 0.46):
            pen.ellipse((x + wheel - 0.05, y + 0.05, x + wheel + 0.05, y + 0.15), (28, 28, 30))
        pen.polygon([(x + 0.66, y + 0.04), (x + 0.69, y + 0.04), (x + 0.62, 1.0), (x + 0.57, 1.0)], (216, 214, 206))
        x += draws.uniform(0.7, 0.85)
