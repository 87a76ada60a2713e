"""Poses of a pedestrian: how far the feet are apart, which one is up, and the bent arms of someone who runs."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.world.palette import RGB, shade
from shards.world.pen import Pen, Point

if TYPE_CHECKING:
    from shards.world.render import Figure


@dataclass(frozen=True)
class Stance:
    """A step frozen in time, in body units.

    Attributes:
        swing: Position of the arms in [-1, 1].
        stride: Distance of each foot from the axis, seen from the side.
        lift: Height of the left foot in the picture; of the right one where it is negative.
        bent: Whether the arms are bent.
    """

    swing: float
    stride: float
    lift: float
    bent: bool = False


def stance(pose: str, view: str, gait: float) -> Stance:
    """Return the stance of a pose.

    Args:
        pose: walking, standing or running; "" for a step of any width, of which no sentence speaks.
        view: front, side or back.
        gait: Phase of the step in [0, 1).
    """
    swing = math.sin(2 * math.pi * gait)
    if pose == "standing":
        return Stance(0.0, 0.03, 0.0)
    if pose == "running":
        sign = math.copysign(1.0, swing)
        return Stance(sign, 0.21, 0.13 if view == "side" else 0.15 * sign, bent=True)
    if pose == "walking":
        swing = math.copysign(0.6 + 0.4 * abs(swing), swing)
        return Stance(swing, 0.15 * abs(swing) + 0.03, (0.02 if view == "side" else 0.05) * swing)
    return Stance(swing, 0.15 * abs(swing) + 0.03, 0.02 * swing)


def bent_arm(figure: "Figure", pen: Pen, side: float, swing: float, colour: RGB, far: bool = False) -> None:
    """Draw an arm bent at the elbow.

    Args:
        figure: Whose arm.
        pen: Pen in body units.
        side: -1 or 1 seen from the front or the back, 0 seen from the side.
        swing: Position of the arm in [-1, 1], seen from the side.
        colour: Colour of the sleeve.
        far: Whether it is the arm behind the body.
    """
    kind = figure.seen["upper"]
    width = figure.limb * (1.2 if kind in ("coat", "jacket", "hoodie") else 1.0)
    shoulder = (side * figure.shoulder * 0.98, figure.neck + 0.045)
    half = 0.5 * (figure.crotch - shoulder[1])
    if side:
        elbow: Point = (shoulder[0] + side * 0.06, shoulder[1] + half)
        hand: Point = (elbow[0] - side * 0.045, elbow[1] - 0.09)
    else:
        elbow = (shoulder[0] - 0.06 + 0.09 * swing, shoulder[1] + half)
        hand = (elbow[0] + 0.13, elbow[1] - 0.04)
    dark = 0.75 if far else 0.86
    sleeve, bare = shade(colour, dark), shade(figure.skin, 0.85 if far else 0.96)
    upper_arm = sleeve if kind != "tank top" else bare
    forearm = sleeve if kind not in ("tank top", "t-shirt") else bare
    pen.limb(shoulder, elbow, width * 1.1, width * 0.95, upper_arm)
    pen.limb(elbow, hand, width * 0.95, width * 0.8, forearm)
    if forearm is sleeve:
        cuff = (hand[0] - (hand[0] - elbow[0]) * 0.4, hand[1] - (hand[1] - elbow[1]) * 0.4)
        pen.limb(cuff, hand, width * 0.9, width * 0.85, shade(figure.trim["cuffs"], dark))
        size = width * 0.5
        pen.ellipse((hand[0] - size, hand[1] - 0.02, hand[0] + size, hand[1] + 0.025), figure.skin)
