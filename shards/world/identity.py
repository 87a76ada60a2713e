"""Identities: 22 named attributes, unnamed latents, and families of siblings that differ in one attribute."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from shards.world.draws import Draws

UPPER_COLOURS = (
    "black", "white", "gray", "red", "orange", "yellow", "green",
    "blue", "navy", "purple", "pink", "brown", "beige",
)  # fmt: skip
LOWER_COLOURS = ("black", "white", "gray", "red", "green", "blue", "navy", "purple", "brown", "beige")
BAG_COLOURS = ("black", "white", "red", "orange", "yellow", "green", "blue", "pink", "brown")
SCARF_COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "build": ("slim", "average", "heavy"),
    "height": ("short", "average", "tall"),
    "presentation": ("man", "woman"),
    "age": ("young", "adult", "elderly"),
    "skin": ("pale", "tan", "dark"),
    "hair": ("short", "long", "ponytail", "bald"),
    "hair_colour": ("black", "brown", "blonde", "red", "gray"),
    "upper": ("t-shirt", "tank top", "sweater", "hoodie", "jacket", "coat"),
    "upper_colour": UPPER_COLOURS,
    "pattern": ("plain", "striped", "pinstriped", "checked", "dotted", "two-tone", "sash"),
    "upper_colour2": UPPER_COLOURS,
    "logo": ("none", "logo"),
    "lower": ("trousers", "shorts", "skirt", "leggings"),
    "lower_colour": LOWER_COLOURS,
    "shoes": ("sneakers", "boots", "sandals"),
    "shoe_colour": ("black", "white", "gray", "red", "blue", "brown"),
    "bag": ("none", "backpack", "handbag", "shoulder bag", "suitcase"),
    "bag_colour": BAG_COLOURS,
    "hat": ("none", "cap", "beanie", "sun hat"),
    "hat_colour": ("black", "white", "red", "yellow", "green", "blue"),
    "scarf": ("none", *SCARF_COLOURS),
    "glasses": ("none", "glasses", "sunglasses"),
}
"""The 22 named attributes and their values."""

_WEIGHTS: dict[str, tuple[float, ...]] = {
    "pattern": (0.34, 0.11, 0.11, 0.11, 0.11, 0.11, 0.11),
    "logo": (0.7, 0.3),
    "hair": (0.35, 0.3, 0.25, 0.1),
    "bag": (0.24, 0.19, 0.19, 0.19, 0.19),
    "hat": (0.55, 0.15, 0.15, 0.15),
    "scarf": (0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05),
    "glasses": (0.6, 0.2, 0.2),
    "build": (0.3, 0.4, 0.3),
    "height": (0.3, 0.4, 0.3),
    "age": (0.25, 0.5, 0.25),
}
_DIFF_WEIGHTS: dict[str, float] = {
    "upper": 2.0, "upper_colour": 3.0, "pattern": 2.0, "upper_colour2": 1.0, "lower": 2.0, "lower_colour": 3.0,
    "bag": 2.0, "bag_colour": 1.5, "hat": 1.5, "hat_colour": 1.0, "shoes": 0.5, "shoe_colour": 1.2, "scarf": 0.8,
    "hair": 1.0, "hair_colour": 1.0, "presentation": 1.2, "build": 0.2, "age": 0.15, "skin": 0.2, "logo": 0.15,
    "glasses": 0.15,
}  # fmt: skip
HELD_OUT_MOST = 5
"""Most colours per garment (of 13) that can be held out so that every garment and every colour stays in training."""
_SPLITS = {"train": 0, "val": 1, "test": 2, "distractor": 3, "junk": 4}
_SPLIT_STRIDE = 10_000_000
_FAMILY, _LATENT = 101, 102
LATENTS = ("upper", "upper2", "lower", "shoes", "bag", "hat", "skin")
"""Things whose colour is jittered per identity: I2I can see what no sentence says."""
TRIMS = ("belt", "socks", "cuffs", "inner", "hem")
"""Small things with a colour of their own that no sentence names."""


@dataclass(frozen=True)
class Identity:
    """One person of a world.

    Attributes:
        key: Number of the identity in its world (split and position), the second entry of every image seed.
        split: train, val, test, distractor or junk.
        family: Position of the family in its split; families never span splits.
        attributes: The 22 named attributes.
        diff: Attribute in which this member differs from the base of its family, None for the base.
        tint: Per thing an RGB offset (-1..1 units of 12 grey levels).
        trim: Colour name per unnamed small thing.
        shape: Unnamed proportions (shoulders, legs, head), each about -1..1.
        left_handed: On which side bags hang.
    """

    key: int
    split: str
    family: int
    attributes: Mapping[str, str]
    diff: str | None
    tint: Mapping[str, tuple[float, float, float]]
    trim: Mapping[str, str]
    shape: tuple[float, float, float]
    left_handed: bool


def effective(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes that can be seen at all: a colour without its thing becomes "none"."""
    seen = dict(attributes)
    if seen["pattern"] == "plain":
        seen["upper_colour2"] = "none"
    if seen["hair"] == "bald":
        seen["hair_colour"] = "none"
    for thing in ("bag", "hat"):
        if seen[thing] == "none":
            seen[f"{thing}_colour"] = "none"
    return seen


def _base(draws: Draws) -> dict[str, str]:
    attributes = {}
    for name, values in ATTRIBUTES.items():
        weights = _WEIGHTS.get(name, (1.0,) * len(values))
        attributes[name] = draws.weighted(values, weights)
    others = [colour for colour in UPPER_COLOURS if colour != attributes["upper_colour"]]
    attributes["upper_colour2"] = draws.pick(others)
    return attributes


def _changed(base: dict[str, str], draws: Draws) -> tuple[dict[str, str], str]:
    """Return the base with one attribute changed so that the change can be seen, and the name of the attribute."""
    seen = effective(base)
    names = [
        name for name in _DIFF_WEIGHTS if seen[name] != "none" or name in ("bag", "hat", "scarf", "logo", "glasses")
    ]
    name = draws.weighted(names, [_DIFF_WEIGHTS[name] for name in names])
    taken = {base[name]}
    if name in ("upper_colour", "upper_colour2"):
        taken |= {base["upper_colour"], base["upper_colour2"]}
    value = draws.pick([value for value in ATTRIBUTES[name] if value not in taken])
    return {**base, name: value}, name


def is_held_out(attributes: Mapping[str, str], colours: int) -> bool:
    """Return whether an upper garment in its colour is reserved for test people.

    Args:
        attributes: Attributes of an identity.
        colours: Reserved colours per garment, of 13; the same ones in worlds of all seeds, so that no other world
            shows the pairs to a model beforehand.
    """
    garment = ATTRIBUTES["upper"].index(attributes["upper"])
    colour = UPPER_COLOURS.index(attributes["upper_colour"])
    return (5 * garment + colour) % len(UPPER_COLOURS) < colours


@lru_cache(maxsize=4096)
def _family(
    world_seed: int, split: int, family: int, members: int, held_out: int
) -> tuple[tuple[dict[str, str], str | None], ...]:
    draws = Draws(world_seed, _FAMILY, split, family)
    reserved = split not in (_SPLITS["train"], _SPLITS["val"])

    def allowed(attributes: Mapping[str, str]) -> bool:
        return not held_out or is_held_out(attributes, held_out) == reserved

    base = _base(draws)
    while not allowed(base):
        base = _base(draws)
    found: list[tuple[dict[str, str], str | None]] = [(base, None)]
    while len(found) < members:
        attributes, diff = _changed(base, draws)
        if allowed(attributes) and all(attributes != other for other, _ in found):
            found.append((attributes, diff))
    return tuple(found)


def _tint(draws: Draws) -> float:
    # Cut early: a colour must keep the name that captions give it.
    return draws.normal(limit=2.0)


def make_identity(world_seed: int, split: str, index: int, siblings: int, held_out: int = 0) -> Identity:
    """Return identity number `index` of a split; it depends on nothing but the arguments.

    Args:
        world_seed: Seed of the world.
        split: train, val, test, distractor or junk.
        index: Position inside the split, from 0.
        siblings: Members of a family besides its base.
        held_out: Colours per upper garment that only test people (distractors and junk too) wear, and they always.
    """
    code = _SPLITS[split]
    family, member = divmod(index, siblings + 1)
    attributes, diff = _family(world_seed, code, family, siblings + 1, held_out)[member]
    draws = Draws(world_seed, _LATENT, code, index)
    tint = {name: (_tint(draws), _tint(draws), _tint(draws)) for name in LATENTS}
    trim = {name: draws.pick(UPPER_COLOURS) for name in TRIMS}
    shape = (draws.uniform(-1, 1), draws.uniform(-1, 1), draws.uniform(-1, 1))
    key = code * _SPLIT_STRIDE + index
    return Identity(key, split, family, attributes, diff, tint, trim, shape, draws.chance(0.5))
