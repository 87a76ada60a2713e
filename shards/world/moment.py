"""Instance-level content: what holds for one picture of a person and not for the person.

A moment decides the pose and whether a bag is carried. People who own a bag put it down in some pictures, people
who own none borrow one in some. An encoder that learns "all pictures of a person are alike" must forget exactly this,
while sentences about single pictures tell it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shards.world.draws import Draws
from shards.world.identity import BAG_COLOURS, Identity, effective

POSES = ("walking", "standing", "running")
IN_IMAGE = "image."
"""Prefix of mentions that hold for one picture only, such as ("image.pose", "running")."""
CARRIED = ("bag", "bag_colour")
"""Attributes of an identity that belong to the moment as soon as a world has instance-level content."""
_KINDS = ("backpack", "handbag", "shoulder bag", "suitcase")
_MOMENT = 205


@dataclass(frozen=True)
class Moment:
    """What one picture shows beyond the identity.

    Attributes:
        pose: walking, standing or running.
        bag: The bag carried in this picture, or none.
        bag_colour: Its colour, none without a bag.
    """

    pose: str
    bag: str
    bag_colour: str

    def shown(self, identity: Identity) -> Identity:
        """Return the person as this picture shows it."""
        bag = {"bag": self.bag}
        if self.bag != "none":
            bag["bag_colour"] = self.bag_colour
        return replace(identity, attributes={**identity.attributes, **bag})

    def facts(self, view: str) -> dict[str, str]:
        """Return everything that a sentence may say about the picture, by the names of mentions."""
        return {
            f"{IN_IMAGE}pose": self.pose, f"{IN_IMAGE}bag": self.bag,
            f"{IN_IMAGE}bag_colour": self.bag_colour, f"{IN_IMAGE}view": view,
        }  # fmt: skip


def make_moment(
    world_seed: int, key: int, attributes: Mapping[str, str], camera: int, k: int, instance: float
) -> Moment:
    """Return the moment of one picture; it depends on nothing but the arguments.

    Args:
        world_seed: Seed of the world.
        key: Key of the identity that the picture shows.
        attributes: Its attributes.
        camera: 0-based camera number.
        k: Which of the pictures of this identity by this camera.
        instance: Strength in (0, 1]: at 1 a bag is there in every second picture of a person and every pose as likely.
    """
    draws = Draws(world_seed, _MOMENT, key, camera, k)
    pose = draws.pick(POSES) if draws.chance(instance) else "walking"
    own = effective(attributes)
    changed = draws.chance(0.5 * instance)
    if own["bag"] == "none":
        kind, colour = draws.pick(_KINDS), draws.pick(BAG_COLOURS)
        return Moment(pose, kind, colour) if changed else Moment(pose, "none", "none")
    return Moment(pose, "none", "none") if changed else Moment(pose, own["bag"], own["bag_colour"])
