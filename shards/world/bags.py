"""Bags of a pedestrian: backpack, handbag, shoulder bag and suitcase, in body units."""

from typing import TYPE_CHECKING

from shards.world.palette import RGB, shade
from shards.world.pen import Box, Pen

if TYPE_CHECKING:
    from shards.world.render import Figure


def _box(figure: "Figure", box: Box) -> None:
    figure.boxes["bag"] = figure.boxes["bag_colour"] = box


def draw_behind(figure: "Figure", pen: Pen) -> None:
    """Draw what hangs behind the body: a backpack seen from the front or the side."""
    if figure.seen["bag"] == "backpack" and figure.view != "back":
        if figure.view == "front":
            half = figure.shoulder * 1.3
            box = (-half, figure.neck + 0.05, half, figure.crotch - 0.05)
        else:
            box = (-figure.shoulder - 0.14, figure.neck + 0.03, -figure.shoulder * 0.5, figure.crotch - 0.06)
        pen.rectangle(box, figure.bag)
        if figure.view == "side":
            _box(figure, box)


def draw_before(figure: "Figure", pen: Pen, swing: float) -> None:
    """Draw what hangs before or beside the body; `swing` in [-1, 1] is the position of the step."""
    kind, trim, side = figure.seen["bag"], shade(figure.bag, 0.7), figure.hand_side
    if kind == "backpack":
        _backpack(figure, pen, trim)
    elif kind == "handbag":
        x = side * (figure.shoulder + 0.045) if figure.view != "side" else 0.03 + 0.1 * swing
        y = figure.crotch
        pen.line([(x - 0.045, y + 0.05), (x, y - 0.03), (x + 0.045, y + 0.05)], 0.016, trim)
        box = (x - 0.075, y + 0.035, x + 0.075, y + 0.145)
        pen.polygon([(x - 0.06, box[1]), (x + 0.06, box[1]), (box[2], box[3]), (box[0], box[3])], figure.bag)
        pen.rectangle((x - 0.015, box[1], x + 0.015, box[1] + 0.03), trim)
        _box(figure, box)
    elif kind == "shoulder bag":
        x = side * figure.hip * 1.05 if figure.view != "side" else -0.01
        y = figure.crotch - 0.06
        strap = figure.bag if figure.view != "side" else trim
        start = (
            (-side * figure.shoulder * 0.75, figure.neck + 0.02) if figure.view != "side" else (0.0, figure.neck + 0.03)
        )
        pen.line([start, (x, y)], 0.026, strap)
        box = (x - 0.075, y - 0.005, x + 0.075, y + 0.105)
        pen.rectangle(box, figure.bag)
        pen.rectangle((box[0], box[1], box[2], y + 0.04), trim)
        _box(figure, box)
    elif kind == "suitcase":
        x = side * (figure.hip + 0.12) if figure.view != "side" else -0.21
        pen.line([(x - 0.03, 0.74), (x - 0.03, 0.6), (x + 0.03, 0.6), (x + 0.03, 0.74)], 0.014, (70, 70, 74))
        box = (x - 0.075, 0.7, x + 0.075, 0.955)
        pen.rectangle(box, figure.bag)
        for offset in (-0.03, 0.03):
            pen.rectangle((x + offset - 0.008, 0.72, x + offset + 0.008, 0.935), trim)
            pen.ellipse((x + offset * 1.6 - 0.014, 0.945, x + offset * 1.6 + 0.014, 0.975), (30, 30, 32))
        _box(figure, box)


def _backpack(figure: "Figure", pen: Pen, trim: RGB) -> None:
    top, bottom, half = figure.neck + 0.035, figure.crotch - 0.05, figure.shoulder * 0.82
    if figure.view == "back":
        box = (-half, top, half, bottom)
        pen.rectangle(box, figure.bag)
        pen.rectangle((-half * 0.7, (top + bottom) / 2, half * 0.7, bottom - 0.02), trim)
        _box(figure, box)
    elif figure.view == "front":
        for sign in (-1.0, 1.0):
            pen.polygon(
                [
                    (sign * half * 0.5, figure.neck + 0.01),
                    (sign * half * 0.9, figure.neck + 0.01),
                    (sign * half * 0.95, bottom - 0.03),
                    (sign * half * 0.65, bottom - 0.03),
                ],
                figure.bag,
            )
        _box(figure, (-figure.shoulder, top, figure.shoulder, bottom))
