"""Drawing primitives in body units: a pen maps them to the pixels of a supersampled picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from shards.world.palette import RGB

Point = tuple[float, float]
Box = tuple[float, float, float, float]
SUPERSAMPLE = 2


class Pen:
    """Draws filled shapes given in units of an object (x to the right, y down, one unit = `size` pixels)."""

    def __init__(self, image: Image.Image, origin: Point, size: float, flip: bool = False) -> None:
        """Place the unit square's origin at a pixel of the supersampled picture; `flip` mirrors x."""
        self._draw = ImageDraw.Draw(image)
        self._x, self._y = origin
        self._size = size
        self._sign = -size if flip else size

    def _points(self, points: Sequence[Point]) -> list[Point]:
        x0, y0, sign, size = self._x, self._y, self._sign, self._size
        return [(x0 + sign * x, y0 + size * y) for x, y in points]

    def box(self, box: Box) -> Box:
        """Return a box of body units in pixels, with left <= right."""
        left, right = self._x + self._sign * box[0], self._x + self._sign * box[2]
        return (
            min(left, right),
            self._y + self._size * box[1],
            max(left, right),
            self._y + self._size * box[3],
        )

    def polygon(self, points: Sequence[Point], fill: RGB) -> None:
        """Fill a polygon."""
        self._draw.polygon(self._points(points), fill=fill)

    def rectangle(self, box: Box, fill: RGB) -> None:
        """Fill an axis-parallel rectangle."""
        self._draw.rectangle(self.box(box), fill=fill)

    def ellipse(self, box: Box, fill: RGB) -> None:
        """Fill the ellipse inscribed in a box."""
        self._draw.ellipse(self.box(box), fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: RGB) -> None:
        """Stroke a polyline of the given width (body units, at least one pixel)."""
        self._draw.line(self._points(points), fill=fill, width=max(1, round(width * self._size)), joint="curve")

    def limb(self, start: Point, end: Point, width0: float, width1: float, fill: RGB) -> None:
        """Fill a limb: a bar from start to end with a width at either end and a round end."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = max((dx * dx + dy * dy) ** 0.5, 1e-6)
        nx, ny = -dy / length / 2, dx / length / 2
        self.polygon(
            [
                (start[0] + nx * width0, start[1] + ny * width0),
                (end[0] + nx * width1, end[1] + ny * width1),
                (end[0] - nx * width1, end[1] - ny * width1),
                (start[0] - nx * width0, start[1] - ny * width0),
            ],
            fill,
        )
        half = width1 / 2
        self.ellipse((end[0] - half, end[1] - half, end[0] + half, end[1] + half), fill)


class Panel:
    """A trapezoid with a vertical axis: the cloth a pattern is drawn on, exactly clipped without a mask."""

    def __init__(self, top: float, bottom: float, half_top: float, half_bottom: float, lean: float = 0.0) -> None:
        """Set its y range, its half widths at top and bottom, and how far the bottom axis is moved in x."""
        self.top, self.bottom = top, bottom
        self._half_top, self._half_bottom, self._lean = half_top, half_bottom, lean

    def at(self, across: float, down: float) -> Point:
        """Return the point at `across` in [-1, 1] (left to right edge) and `down` in [0, 1]."""
        half = self._half_top + (self._half_bottom - self._half_top) * down
        return self._lean * down + across * half, self.top + (self.bottom - self.top) * down

    def patch(self, left: float, right: float, up: float, down: float) -> list[Point]:
        """Return the quadrilateral between two values of `across` and two of `down`."""
        return [self.at(left, up), self.at(right, up), self.at(right, down), self.at(left, down)]


def draw_pattern(pen: Pen, panel: Panel, pattern: str, colour: RGB, second: RGB) -> None:
    """Fill a panel with one of the seven patterns.

    Args:
        pen: Pen in the units of the panel.
        panel: The cloth.
        pattern: plain, striped, pinstriped, checked, dotted, two-tone or sash.
        colour: Ground colour.
        second: Colour of the pattern.
    """
    pen.polygon(panel.patch(-1, 1, 0, 1), colour)
    if pattern in ("striped", "checked"):
        width = 0.115 if pattern == "striped" else 0.07
        for row in range(4):
            top = 0.09 + row * 0.24
            pen.polygon(panel.patch(-1, 1, top, top + width), second)
    if pattern in ("pinstriped", "checked"):
        width = 0.22 if pattern == "pinstriped" else 0.14
        for column in range(4):
            left = -0.86 + column * 0.5
            pen.polygon(panel.patch(left, left + width, 0, 1), second)
    if pattern == "two-tone":
        pen.polygon(panel.patch(-1, 1, 0.5, 1), second)
    if pattern == "sash":
        pen.polygon(
            [
                panel.at(-1, 0),
                panel.at(-0.35, 0),
                panel.at(1, 0.75),
                panel.at(1, 1),
                panel.at(0.6, 1),
                panel.at(-1, 0.3),
            ],
            second,
        )
    if pattern == "dotted":
        radius = (panel.bottom - panel.top) * 0.055
        for row in range(4):
            for column in range(3 + row % 2):
                x, y = panel.at(-0.66 + column * 0.66 - (0.28 if row % 2 else 0.0), 0.14 + row * 0.24)
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), second)
