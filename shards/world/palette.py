"""Colours of the world by name, as 8-bit RGB."""

from collections.abc import Sequence

RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "black": (26, 26, 30),
    "white": (240, 240, 238),
    "gray": (140, 142, 146),
    "red": (208, 32, 38),
    "orange": (242, 132, 26),
    "yellow": (246, 214, 44),
    "green": (38, 142, 64),
    "blue": (52, 112, 222),
    "navy": (24, 34, 96),
    "purple": (122, 50, 156),
    "pink": (244, 146, 184),
    "brown": (116, 70, 36),
    "beige": (214, 190, 148),
}
SKIN: dict[str, RGB] = {"pale": (246, 208, 182), "tan": (206, 150, 108), "dark": (110, 72, 48)}
HAIR: dict[str, RGB] = {
    "black": (22, 18, 20),
    "brown": (92, 56, 30),
    "blonde": (232, 200, 108),
    "red": (178, 72, 30),
    "gray": (168, 168, 170),
}
_TINT_LEVELS = 12.0


def tinted(colour: RGB, tint: Sequence[float]) -> RGB:
    """Return the colour moved by an identity's own tint (units of 12 grey levels, cut at 0 and 255)."""
    red, green, blue = (max(0, min(255, int(c + _TINT_LEVELS * t + 0.5))) for c, t in zip(colour, tint, strict=True))
    return red, green, blue


def shade(colour: RGB, factor: float) -> RGB:
    """Return the colour darkened (factor < 1) or lightened (factor > 1)."""
    red, green, blue = (max(0, min(255, int(c * factor + 0.5))) for c in colour)
    return red, green, blue
