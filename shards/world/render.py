"""One pedestrian drawn from an identity: body, garments, bags and hats, and the box of every attribute."""

from dataclasses import dataclass, field

from shards.world import bags
from shards.world.identity import Identity, effective
from shards.world.palette import HAIR, PALETTE, RGB, SKIN, shade, tinted
from shards.world.pen import Box, Panel, Pen, draw_pattern
from shards.world.poses import bent_arm, stance

VIEWS = ("front", "side", "back")


@dataclass
class Figure:
    """A pedestrian in one pose, in body units: y from 0 (crown) to 1 (soles), x = 0 is the body's axis.

    Attributes:
        identity: The person.
        view: front, side (facing right before any flip) or back.
        gait: Phase of the step in [0, 1).
        pose: walking, standing or running; "" for a step of any width.
        feet_box: After drawing, the box of the lower legs, which tell the pose.
        boxes: After drawing, per attribute the box in which it can be seen; attributes that this view hides are absent.
    """

    identity: Identity
    view: str
    gait: float
    pose: str = ""
    boxes: dict[str, Box] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Work out colours and proportions once."""
        self.seen = effective(self.identity.attributes)
        self.step = stance(self.pose, self.view, self.gait)
        self.feet_box: Box = (0.0, 0.0, 0.0, 0.0)
        get = self.identity.attributes
        tint = self.identity.tint
        self.skin = tinted(SKIN[get["skin"]], [0.5 * t for t in tint["skin"]])
        self.hair = HAIR[get["hair_colour"]]
        self.upper = tinted(PALETTE[get["upper_colour"]], tint["upper"])
        self.upper2 = tinted(PALETTE[get["upper_colour2"]], tint["upper2"])
        self.lower = tinted(PALETTE[get["lower_colour"]], tint["lower"])
        self.shoe = tinted(PALETTE[get["shoe_colour"]], tint["shoes"])
        self.bag = tinted(PALETTE[get["bag_colour"]], tint["bag"])
        self.hat = tinted(PALETTE[get["hat_colour"]], tint["hat"])
        self.trim = {name: PALETTE[colour] for name, colour in self.identity.trim.items()}
        shoulder, leg, head = self.identity.shape
        wide = {"slim": 0.84, "average": 1.0, "heavy": 1.24}[get["build"]] * (1 + 0.05 * shoulder)
        woman = get["presentation"] == "woman"
        side = 0.64 if self.view == "side" else 1.0
        self.shoulder = (0.118 if woman else 0.142) * wide * side
        self.waist = (0.088 if woman else 0.124) * wide * side
        self.hip = (0.128 if woman else 0.118) * wide * side
        self.limb = 0.062 * (0.5 + 0.5 * wide)
        self.head = 0.062 * (1 + 0.05 * head) * {"young": 1.16, "adult": 1.0, "elderly": 0.96}[get["age"]]
        self.chin = 0.02 + 2.3 * self.head
        self.neck = self.chin + 0.015
        self.crotch = 0.52 + 0.014 * leg + {"short": 0.035, "average": 0.0, "tall": -0.035}[get["height"]]
        self.stoop = 0.035 if get["age"] == "elderly" and self.view == "side" else 0.0
        self.hand_side = -1.0 if self.identity.left_handed else 1.0
        if self.view == "back":
            self.hand_side = -self.hand_side

    def draw(self, pen: Pen) -> dict[str, Box]:
        """Draw the person and return the attribute boxes in body units."""
        swing = self.step.swing
        self.boxes = {}
        bags.draw_behind(self, pen)
        if self.seen["hair"] == "long" and self.view != "back":
            self._long_hair(pen)
        if self.view == "side":
            self._arm(pen, 0.0, -swing, self.upper, far=True)
        self._legs(pen)
        self._torso(pen)
        if self.view == "side":
            self._arm(pen, 0.0, swing, self.upper)
        else:
            self._arm(pen, -1.0, 0.25 * swing, self.upper)
            self._arm(pen, 1.0, -0.25 * swing, self.upper)
        self._head(pen)
        self._scarf(pen)
        bags.draw_before(self, pen, swing)
        self._whole_body()
        return self.boxes

    def _whole_body(self) -> None:
        body = (-self.shoulder, self.neck, self.shoulder, 0.95)
        for name in ("build", "height", "presentation", "age"):
            self.boxes[name] = body
        self.boxes["skin"] = (-self.head, 0.06, self.head, self.chin)

    def _legs(self, pen: Pen) -> None:
        kind = self.seen["lower"]
        top, ground = self.crotch - 0.05, 0.955
        stride = self.step.stride if self.view == "side" else 0.0
        apart = 0.0 if self.view == "side" else self.hip * 0.52
        lift = self.step.lift
        feet = [(-apart - stride, ground - max(0.0, lift)), (apart + stride, ground - max(0.0, -lift))]
        bare = kind in ("shorts", "skirt")
        for position, foot in enumerate(feet):
            hip = ((-apart, top), (apart, top))[position]
            dark = 0.82 if position == 0 and self.view == "side" else 1.0
            width = self.limb * (1.55 if kind == "trousers" else 1.25)
            end = 0.92 if kind == "trousers" else 0.62
            pen.limb(hip, foot, width * 1.15, width * end, shade(self.skin if bare else self.lower, dark))
            if kind == "shorts":
                knee = (hip[0] + (foot[0] - hip[0]) * 0.5, hip[1] + (foot[1] - hip[1]) * 0.5)
                pen.limb(hip, knee, width * 1.5, width * 1.45, shade(self.lower, dark))
            if not bare:
                self._shoe(pen, foot, dark)
                continue
            ankle = (foot[0] - (foot[0] - hip[0]) * 0.27, foot[1] - (foot[1] - hip[1]) * 0.27)
            band = self.trim["socks" if bare else "hem"]
            pen.limb(
                ankle,
                foot,
                width * (0.85 if bare else end * 1.1),
                width * (0.75 if bare else end),
                shade(band, dark),
            )
            self._shoe(pen, foot, dark)
        waist = Panel(self.crotch - 0.1, self.crotch + 0.02, self.waist * 1.03, self.hip * 1.02)
        pen.polygon(waist.patch(-1, 1, 0, 1), self.lower)
        bottom = ground - 0.05
        if kind == "skirt":
            bottom = self.crotch + 0.24
            flare = self.hip * 1.35 + 0.6 * stride
            cloth = Panel(self.crotch - 0.1, bottom, self.waist * 1.05, flare)
            pen.polygon(cloth.patch(-1, 1, 0, 1), self.lower)
            pen.polygon(cloth.patch(-1, 1, 0.8, 0.93), self.trim["hem"])
        elif kind == "shorts":
            bottom = self.crotch + 0.2
        pen.polygon(waist.patch(-1, 1, 0.5, 0.95), self.trim["belt"])
        box = (-self.hip - stride, self.crotch - 0.02, self.hip + stride, bottom)
        self.boxes["lower"] = self.boxes["lower_colour"] = box
        self.feet_box = (feet[0][0] - 0.05, 0.78, feet[1][0] + 0.07, 0.995)
        self.boxes["shoes"] = self.boxes["shoe_colour"] = (feet[0][0] - 0.05, 0.91, feet[1][0] + 0.07, 0.995)

    def _shoe(self, pen: Pen, foot: tuple[float, float], dark: float) -> None:
        kind, colour = self.seen["shoes"], shade(self.shoe, dark)
        x, y = foot
        toe = 0.085 if self.view == "side" else 0.05
        heel = -0.045
        if kind == "boots":
            pen.rectangle((x - 0.042, y - 0.1, x + 0.042, y + 0.02), colour)
        pen.polygon(
            [
                (x + heel, y - 0.02),
                (x + toe * 0.5, y - 0.025),
                (x + toe, y + 0.02),
                (x + toe, y + 0.04),
                (x + heel, y + 0.04),
            ],
            colour,
        )
        if kind == "sneakers":
            pen.rectangle((x + heel, y + 0.026, x + toe, y + 0.04), (236, 236, 232))
        if kind == "sandals":
            pen.polygon(
                [(x - 0.01, y - 0.022), (x + 0.022, y - 0.022), (x + 0.032, y + 0.022), (x, y + 0.022)],
                self.skin,
            )

    def _torso(self, pen: Pen) -> None:
        kind = self.seen["upper"]
        bottom = {"coat": self.crotch + 0.22, "tank top": self.crotch - 0.045}.get(kind, self.crotch - 0.035)
        width = {"coat": 1.14, "jacket": 1.1, "hoodie": 1.1, "sweater": 1.04, "tank top": 0.9}.get(kind, 1.0)
        low = self.hip * (1.3 if kind == "coat" else 1.04) * width
        middle = self.crotch - 0.12
        panel = Panel(self.neck + 0.01, bottom, self.shoulder * width, max(low, self.waist * width), -self.stoop)
        colour, second = self.upper, self.upper2
        draw_pattern(pen, panel, self.seen["pattern"], colour, second)
        trim = shade(colour, 0.72) if sum(colour) > 150 else shade(colour, 2.2)
        if kind == "hoodie":
            half = self.head * 1.25
            pen.ellipse((-half, self.neck - 0.035, half, self.neck + 0.045), trim)
            if self.view == "front":
                pen.polygon(Panel(middle - 0.04, middle + 0.06, 0.05, 0.075).patch(-1, 1, 0, 1), trim)
        elif kind == "sweater":
            pen.polygon(panel.patch(-1, 1, 0.9, 1), trim)
            pen.polygon(panel.patch(-0.45, 0.45, 0, 0.05), trim)
        elif kind in ("jacket", "coat") and self.view == "front":
            pen.polygon([panel.at(-0.36, 0), panel.at(0.36, 0), panel.at(0, 0.4)], self.trim["inner"])
            pen.polygon(panel.patch(-0.07, 0.07, 0.38, 1), trim)
        elif kind == "t-shirt" or kind == "tank top":
            half = self.head * (0.6 if kind == "t-shirt" else 0.95)
            depth = 0.03 if kind == "t-shirt" else 0.055
            if self.view != "back":
                pen.ellipse((-half, self.neck - depth + 0.012, half, self.neck + depth), self.skin)
        if kind == "coat":
            pen.polygon(panel.patch(-1, 1, 0.6, 0.65), trim)
        if self.seen["logo"] == "logo" and self.view == "front":
            ink = (240, 240, 236) if sum(colour) < 400 else (30, 30, 34)
            y = self.neck + 0.13
            pen.polygon([(0.0, y - 0.042), (0.045, y), (0.0, y + 0.042), (-0.045, y)], ink)
            self.boxes["logo"] = (-0.045, y - 0.042, 0.045, y + 0.042)
        box = (-self.shoulder, self.neck + 0.02, self.shoulder, self.crotch)
        for name in ("upper", "upper_colour", "pattern", "upper_colour2"):
            self.boxes[name] = box

    def _arm(self, pen: Pen, side: float, swing: float, colour: RGB, far: bool = False) -> None:
        if self.step.bent:
            bent_arm(self, pen, side, swing, colour, far)
            return
        kind = self.seen["upper"]
        width = self.limb * (1.2 if kind in ("coat", "jacket", "hoodie") else 1.0)
        shoulder = (side * self.shoulder * 0.98, self.neck + 0.045)
        reach = self.crotch - shoulder[1] - 0.015
        hand = (
            shoulder[0] + side * 0.03 + 0.17 * swing * (side == 0.0),
            shoulder[1] + reach - 0.03 * abs(swing),
        )
        dark = 0.75 if far else 0.86
        sleeve = shade(colour, dark)
        bare = shade(self.skin, 0.85 if far else 0.96)
        long_sleeve = kind in ("sweater", "hoodie", "jacket", "coat")
        pen.limb(shoulder, hand, width * 1.1, width * 0.8, sleeve if long_sleeve else bare)
        if kind == "t-shirt":
            elbow = (
                shoulder[0] + (hand[0] - shoulder[0]) * 0.38,
                shoulder[1] + (hand[1] - shoulder[1]) * 0.38,
            )
            pen.limb(shoulder, elbow, width * 1.3, width * 1.15, sleeve)
        if long_sleeve:
            cuff = (hand[0] - (hand[0] - shoulder[0]) * 0.24, hand[1] - (hand[1] - shoulder[1]) * 0.24)
            pen.limb(cuff, hand, width * 0.9, width * 0.85, shade(self.trim["cuffs"], dark))
            half = width * 0.5
            pen.ellipse((hand[0] - half, hand[1] - 0.01, hand[0] + half, hand[1] + 0.035), self.skin)

    def _long_hair(self, pen: Pen) -> None:
        half = self.head * 1.22
        back = self.head * 0.55 if self.view == "side" else 0.0
        pen.polygon(
            [
                (-half - back, 0.07),
                (half - 1.6 * back, 0.07),
                (half - back, self.neck + 0.1),
                (-half - back, self.neck + 0.11),
            ],
            self.hair,
        )

    def _head(self, pen: Pen) -> None:
        radius, view, style = self.head, self.view, self.seen["hair"]
        top, chin = 0.02, self.chin
        pen.rectangle((-radius * 0.45, chin - 0.03, radius * 0.45, self.neck + 0.02), shade(self.skin, 0.86))
        pen.ellipse((-radius, top, radius, chin), self.skin)
        brow = top + (chin - top) * 0.42
        if style != "bald":
            if view == "back":
                low = {"short": chin - 0.03, "long": self.neck + 0.13, "ponytail": chin - 0.03}[style]
                pen.ellipse((-radius * 1.08, top - 0.008, radius * 1.08, chin - 0.012), self.hair)
                if style == "long":
                    pen.polygon(Panel(brow, low, radius * 1.1, radius * 1.2).patch(-1, 1, 0, 1), self.hair)
                if style == "ponytail":
                    pen.limb((0.0, brow), (0.0, self.neck + 0.13), 0.03, 0.055, shade(self.hair, 0.82))
            elif view == "front":
                pen.polygon(
                    [
                        (-radius * 1.08, brow + 0.01),
                        (-radius * 0.9, top),
                        (0.0, top - 0.014),
                        (radius * 0.9, top),
                        (radius * 1.08, brow + 0.01),
                        (radius * 0.6, brow - 0.022),
                        (-radius * 0.6, brow - 0.022),
                    ],
                    self.hair,
                )
                if style == "ponytail":
                    pen.limb((radius * 0.8, brow - 0.02), (radius * 1.75, self.neck + 0.05), 0.03, 0.045, self.hair)
            else:
                pen.polygon(
                    [
                        (-radius * 1.12, top + 0.03),
                        (-radius * 0.5, top - 0.012),
                        (radius * 0.6, top),
                        (radius * 0.95, brow - 0.02),
                        (radius * 0.1, brow - 0.01),
                        (-radius * 0.1, chin - 0.03),
                        (-radius * 0.95, chin - 0.035),
                    ],
                    self.hair,
                )
                if style == "ponytail":
                    pen.limb(
                        (-radius * 0.9, brow - 0.02),
                        (-radius * 2.1, self.neck + 0.07),
                        0.035,
                        0.05,
                        self.hair,
                    )
        if self.seen["hat"] == "none":
            low = self.neck + 0.1 if style in ("long", "ponytail") else brow
            self.boxes["hair"] = self.boxes["hair_colour"] = (-radius * 1.1, top, radius * 1.1, low)
        self._face(pen, brow, chin)
        self._hat(pen, brow, top)

    def _face(self, pen: Pen, brow: float, chin: float) -> None:
        radius = self.head
        if self.view == "back":
            return
        eyes = (-0.42, 0.42) if self.view == "front" else (0.62,)
        eye_y = brow + 0.014
        if self.view == "side":
            pen.polygon(
                [(radius * 0.9, eye_y), (radius * 1.25, eye_y + 0.03), (radius * 0.9, eye_y + 0.034)],
                self.skin,
            )
        for eye in eyes:
            x = eye * radius
            pen.ellipse((x - 0.008, eye_y - 0.005, x + 0.008, eye_y + 0.011), (30, 24, 24))
        pen.rectangle(
            (eyes[0] * radius * 0.7, chin - 0.03, eyes[-1] * radius * 0.75 + 0.005, chin - 0.023),
            (150, 60, 60),
        )
        if self.view == "front" and self.seen["glasses"] != "none":
            dark = self.seen["glasses"] == "sunglasses"
            for eye in eyes:
                x = eye * radius
                pen.ellipse((x - 0.026, eye_y - 0.018, x + 0.026, eye_y + 0.026), (20, 20, 24))
                if not dark:
                    pen.ellipse((x - 0.017, eye_y - 0.01, x + 0.017, eye_y + 0.018), (226, 238, 246))
            pen.rectangle((-radius, eye_y - 0.004, radius, eye_y + 0.005), (20, 20, 24))
            self.boxes["glasses"] = (-radius, eye_y - 0.02, radius, eye_y + 0.03)

    def _hat(self, pen: Pen, brow: float, top: float) -> None:
        kind, radius = self.seen["hat"], self.head
        if kind == "none":
            return
        line = brow - 0.015
        crown = [
            (-radius * 1.12, line),
            (-radius * 1.0, top - 0.002),
            (-radius * 0.4, top - 0.03),
            (radius * 0.4, top - 0.03),
            (radius * 1.0, top - 0.002),
            (radius * 1.12, line),
        ]
        pen.polygon(crown, self.hat)
        if kind == "cap" and self.view != "back":
            reach = radius * (2.0 if self.view == "side" else 1.15)
            pen.polygon(
                [
                    (-radius * (1.15 if self.view == "front" else -0.2), line),
                    (reach, line),
                    (reach, line + 0.02),
                    (-radius * (0.8 if self.view == "front" else -0.2), line + 0.026),
                ],
                shade(self.hat, 0.7),
            )
        elif kind == "beanie":
            pen.rectangle((-radius * 1.18, line - 0.02, radius * 1.18, line + 0.016), shade(self.hat, 0.75))
            pen.ellipse((-0.022, top - 0.06, 0.022, top - 0.016), shade(self.hat, 1.3))
        elif kind == "sun hat":
            pen.ellipse((-radius * 2.0, line - 0.018, radius * 2.0, line + 0.022), shade(self.hat, 0.85))
        self.boxes["hat"] = self.boxes["hat_colour"] = (-radius * 1.1, top - 0.02, radius * 1.1, line)

    def _scarf(self, pen: Pen) -> None:
        colour = self.seen["scarf"]
        if colour == "none":
            return
        half, y = self.head * 1.0, self.neck
        pen.polygon(Panel(y - 0.022, y + 0.034, half * 0.85, half * 1.15).patch(-1, 1, 0, 1), PALETTE[colour])
        if self.view != "back":
            pen.polygon(
                [(0.012, y + 0.02), (0.055, y + 0.02), (0.062, y + 0.13), (0.016, y + 0.13)],
                shade(PALETTE[colour], 0.85),
            )
        self.boxes["scarf"] = (-half, y - 0.022, half, y + 0.04)
