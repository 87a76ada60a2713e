"""Single things for generic scenes: garments, bags, hats, shoes and furniture, each in a unit box.

A thing is drawn with x in [-0.5, 0.5] and y in [0, 1]; garments share colours and patterns with the pedestrians but
are laid out flat, so that words transfer and layouts do not.
"""

from collections.abc import Callable

from shards.world.palette import RGB, shade
from shards.world.pen import Panel, Pen, draw_pattern

UPPERS = ("t-shirt", "tank top", "sweater", "hoodie", "jacket", "coat")
LOWERS = ("trousers", "shorts", "skirt", "leggings")
SHOES = ("sneakers", "boots", "sandals")
BAGS = ("backpack", "handbag", "shoulder bag", "suitcase")
HATS = ("cap", "beanie", "sun hat")
OTHERS = ("scarf", "umbrella", "sunglasses", "glasses", "chair", "car", "ball", "boat")
Cloth = tuple[RGB, str, RGB]
"""Ground colour, pattern and second colour."""


def draw_item(pen: Pen, kind: str, cloth: Cloth) -> None:
    """Draw one thing.

    Args:
        pen: Pen whose unit is the thing's size.
        kind: Any name of UPPERS, LOWERS, SHOES, BAGS, HATS or OTHERS.
        cloth: Its colours and pattern.
    """
    for group, paint in _PAINTERS.items():
        if kind in group:
            paint(pen, kind, cloth)


def _upper(pen: Pen, kind: str, cloth: Cloth) -> None:
    colour, pattern, second = cloth
    sleeve = shade(colour, 0.84)
    end = {"t-shirt": 0.36, "tank top": 0.0}.get(kind, 0.78)
    for side in (-1.0, 1.0):
        if end:
            pen.limb((side * 0.26, 0.12), (side * (0.3 + 0.2 * end), 0.1 + end), 0.17, 0.14, sleeve)
    bottom = 1.0 if kind == "coat" else 0.84
    top_half = 0.22 if kind == "tank top" else 0.3
    panel = Panel(0.05, bottom, top_half, 0.36 if kind == "coat" else 0.28)
    draw_pattern(pen, panel, pattern, colour, second)
    trim = shade(colour, 0.7) if sum(colour) > 150 else shade(colour, 2.2)
    if kind == "hoodie":
        pen.ellipse((-0.18, -0.06, 0.18, 0.16), trim)
        pen.polygon(Panel(0.55, 0.72, 0.12, 0.18).patch(-1, 1, 0, 1), trim)
    elif kind == "sweater":
        pen.polygon(panel.patch(-1, 1, 0.9, 1), trim)
        pen.polygon(panel.patch(-0.4, 0.4, 0, 0.06), trim)
    elif kind in ("jacket", "coat"):
        pen.polygon([panel.at(-0.35, 0), panel.at(0.35, 0), panel.at(0, 0.35)], (230, 228, 222))
        pen.polygon(panel.patch(-0.06, 0.06, 0.33, 1), trim)
    else:
        pen.ellipse((-0.12, -0.01, 0.12, 0.13), shade(colour, 0.45))


def _lower(pen: Pen, kind: str, cloth: Cloth) -> None:
    colour, _, _ = cloth
    if kind == "skirt":
        pen.polygon(Panel(0.1, 0.8, 0.2, 0.42).patch(-1, 1, 0, 1), colour)
        pen.rectangle((-0.2, 0.08, 0.2, 0.16), shade(colour, 0.7))
        return
    end, width = {"trousers": (0.97, 0.2), "shorts": (0.48, 0.25), "leggings": (0.95, 0.13)}[kind]
    for side in (-1.0, 1.0):
        x = side * 0.13
        pen.polygon(
            [
                (x - 0.14, 0.1),
                (x + 0.14, 0.1),
                (x + side * 0.04 + width / 2, end),
                (x + side * 0.04 - width / 2, end),
            ],
            colour,
        )
    pen.rectangle((-0.27, 0.05, 0.27, 0.16), shade(colour, 0.8))


def _shoes(pen: Pen, kind: str, cloth: Cloth) -> None:
    colour, _, _ = cloth
    for x in (-0.46, 0.04):
        if kind == "boots":
            pen.rectangle((x, 0.35, x + 0.2, 0.9), colour)
        pen.polygon([(x, 0.68), (x + 0.2, 0.66), (x + 0.42, 0.84), (x + 0.42, 0.95), (x, 0.95)], colour)
        if kind == "sneakers":
            pen.rectangle((x, 0.88, x + 0.42, 0.95), (236, 236, 232))
        if kind == "sandals":
            pen.polygon([(x + 0.06, 0.64), (x + 0.16, 0.64), (x + 0.22, 0.88), (x + 0.1, 0.88)], (214, 190, 168))


def _bag(pen: Pen, kind: str, cloth: Cloth) -> None:
    colour, _, _ = cloth
    trim = shade(colour, 0.68)
    if kind == "backpack":
        pen.ellipse((-0.3, 0.06, 0.3, 0.5), colour)
        pen.rectangle((-0.3, 0.25, 0.3, 0.95), colour)
        pen.rectangle((-0.2, 0.55, 0.2, 0.88), trim)
    elif kind == "handbag":
        pen.line([(-0.22, 0.5), (-0.12, 0.12), (0.12, 0.12), (0.22, 0.5)], 0.06, trim)
        pen.polygon([(-0.32, 0.45), (0.32, 0.45), (0.42, 0.95), (-0.42, 0.95)], colour)
        pen.rectangle((-0.07, 0.45, 0.07, 0.6), trim)
    elif kind == "shoulder bag":
        pen.line([(-0.3, 0.55), (0.0, 0.0), (0.3, 0.55)], 0.045, trim)
        pen.rectangle((-0.38, 0.5, 0.38, 0.95), colour)
        pen.rectangle((-0.38, 0.5, 0.38, 0.7), trim)
    else:
        pen.line([(-0.12, 0.3), (-0.12, 0.04), (0.12, 0.04), (0.12, 0.3)], 0.04, (70, 70, 74))
        pen.rectangle((-0.32, 0.25, 0.32, 0.93), colour)
        for x in (-0.14, 0.14):
            pen.rectangle((x - 0.03, 0.3, x + 0.03, 0.88), trim)
            pen.ellipse((x * 1.5 - 0.05, 0.9, x * 1.5 + 0.05, 1.0), (30, 30, 32))


def _hat(pen: Pen, kind: str, cloth: Cloth) -> None:
    colour, _, _ = cloth
    pen.polygon([(-0.3, 0.8), (-0.26, 0.5), (-0.1, 0.36), (0.1, 0.36), (0.26, 0.5), (0.3, 0.8)], colour)
    if kind == "cap":
        pen.polygon([(0.0, 0.76), (0.56, 0.76), (0.56, 0.84), (0.0, 0.86)], shade(colour, 0.7))
    elif kind == "beanie":
        pen.rectangle((-0.33, 0.68, 0.33, 0.84), shade(colour, 0.75))
        pen.ellipse((-0.09, 0.2, 0.09, 0.4), shade(colour, 1.3))
    else:
        pen.ellipse((-0.6, 0.68, 0.6, 0.9), shade(colour, 0.85))


def _other(pen: Pen, kind: str, cloth: Cloth) -> None:
    colour, _, second = cloth
    dark = shade(colour, 0.7)
    if kind == "scarf":
        pen.limb((-0.1, 0.05), (-0.16, 0.9), 0.2, 0.22, colour)
        pen.limb((0.1, 0.05), (0.16, 0.72), 0.2, 0.22, dark)
    elif kind == "umbrella":
        pen.line([(0.0, 0.3), (0.0, 0.95), (0.1, 0.97)], 0.04, (90, 60, 40))
        pen.polygon(
            [
                (-0.5, 0.45),
                (-0.36, 0.2),
                (0.0, 0.06),
                (0.36, 0.2),
                (0.5, 0.45),
                (0.25, 0.38),
                (0.0, 0.45),
                (-0.25, 0.38),
            ],
            colour,
        )
    elif kind in ("glasses", "sunglasses"):
        pen.rectangle((-0.5, 0.52, 0.5, 0.57), (20, 20, 24))
        for x in (-0.26, 0.26):
            pen.ellipse((x - 0.22, 0.45, x + 0.22, 0.85), (20, 20, 24))
            if kind == "glasses":
                pen.ellipse((x - 0.15, 0.52, x + 0.15, 0.78), (226, 238, 246))
    elif kind == "chair":
        pen.rectangle((-0.3, 0.05, -0.18, 0.98), dark)
        pen.rectangle((-0.3, 0.5, 0.32, 0.62), colour)
        pen.rectangle((0.22, 0.55, 0.32, 0.98), dark)
    elif kind == "car":
        pen.polygon([(-0.28, 0.5), (-0.16, 0.25), (0.2, 0.25), (0.34, 0.5)], (120, 144, 158))
        pen.rectangle((-0.5, 0.48, 0.5, 0.82), colour)
        for x in (-0.28, 0.28):
            pen.ellipse((x - 0.12, 0.72, x + 0.12, 0.96), (28, 28, 30))
    elif kind == "ball":
        pen.ellipse((-0.35, 0.28, 0.35, 0.98), colour)
        pen.ellipse((-0.12, 0.45, 0.12, 0.7), second)
    else:
        pen.polygon([(-0.5, 0.7), (0.5, 0.7), (0.34, 0.95), (-0.34, 0.95)], colour)
        pen.polygon([(0.0, 0.05), (0.0, 0.66), (0.36, 0.66)], (236, 236, 230))


_PAINTERS: dict[tuple[str, ...], Callable[[Pen, str, Cloth], None]] = {
    UPPERS: _upper, LOWERS: _lower, SHOES: _shoes, BAGS: _bag, HATS: _hat, OTHERS: _other,
}  # fmt: skip
