"""Pictures with sentences for the raw formats without identities: people, generic scenes, or a mix of both."""

from dataclasses import dataclass, replace
from typing import Any

from shards.world.draws import Draws
from shards.world.formats.base import Shot, shots_of
from shards.world.spec import ExportSpec, World

_OTHER, _PAIR = 401, 402


@dataclass(frozen=True)
class Pair:
    """A picture with its sentences.

    Attributes:
        data: The JPEG.
        size: Width and height.
        captions: Sentences, one or more.
        person: Whether it shows a pedestrian.
    """

    data: bytes
    size: tuple[int, int]
    captions: tuple[str, ...]
    person: bool


def other_world(world: World) -> World:
    """Return a world with other cameras and other people, for the person pairs of a generic corpus."""
    seed = int(Draws(world.seed, _OTHER).uniform() * 2**50) + 2**51
    return replace(world, seed=seed)


def generic_pair(spec: ExportSpec, number: int, sentences: int = 2) -> Pair:
    """Return a pair of a generic corpus: a scene, or by `person_share` a pedestrian of another world.

    Args:
        spec: The export.
        number: Of the pair.
        sentences: About a pedestrian; a scene has one.
    """
    draws = Draws(spec.world.seed, _PAIR, number)
    if draws.chance(spec.person_share):
        world = other_world(spec.world)
        identity, camera = world.identity("train", number), draws.below(world.cameras)
        shot = Shot(world, identity, 0, camera, 0, world.picture(identity, camera, 0))
        captions = tuple(caption.text for caption in shot.captions(sentences))
        return Pair(shot.picture.jpeg(), shot.picture.image.size, captions, True)
    scene = spec.world.scene(draws)
    return Pair(scene.jpeg(), scene.image.size, (scene.caption,), False)


def person_pair(spec: ExportSpec, number: int) -> Shot:
    """Return the one picture of a training identity, for formats in which nobody has a second one."""
    return next(shots_of(spec, "train", number, 1))


def pair_units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    """Return one unit for each pair: its number."""
    return [(number,) for number in range(spec.ids)]


def split_pair_units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    """Return one unit for each pair of a format with splits: its number and its split."""
    return [(number - 1, split) for number, split, _ in spec.people()]
