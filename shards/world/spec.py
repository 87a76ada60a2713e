"""Parameters of a world and of an export, the named levels, and who belongs to which split."""

from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from shards.world.camera import CAMERAS, Picture, render
from shards.world.captions import Caption, describe
from shards.world.draws import Draws
from shards.world.identity import Identity, make_identity
from shards.world.moment import Moment, make_moment
from shards.world.scenes import Scene, make_scene

CAPTIONS_PER_IMAGE = 2
QUERIES_PER_IDENTITY = 3
_ORDER, _CAPTION, _MISMATCH = 301, 302, 303

LEVELS: dict[str, dict[str, Any]] = {
    "easy": {"hardness": 0.25, "siblings": 0, "coverage": 0.7, "wrong": 0.0},
    "standard": {"hardness": 0.5, "siblings": 3, "coverage": 0.7, "wrong": 0.05},
    "hard": {"hardness": 1.0, "siblings": 7, "coverage": 0.7, "wrong": 0.1},
    "claims": {"hardness": 0.6, "siblings": 1, "coverage": 0.7, "wrong": 0.0},
    "quickstart": {"hardness": 0.35, "siblings": 1, "coverage": 0.7, "wrong": 0.0},
}


@dataclass(frozen=True)
class World:
    """What decides every picture and sentence, besides the identity.

    Attributes:
        seed: World seed.
        hardness: Strength of camera effects and disturbances.
        siblings: Members of a family besides its base.
        coverage: Probability that a caption names a visible attribute.
        wrong: Probability of a wrong colour word.
        instance: Strength of content that holds for single pictures: bags, poses, and phrases about them.
        cameras: Number of cameras.
        unseen_cameras: How many of them, the last ones, take pictures of test people only, and all of these.
        held_out: Colours of each upper garment (0 to 5 of 13) that only test people wear, and they always.
        style: Sentence frames of the captions of train and val people, a name in captions.STYLES.
        test_style: Sentence frames of the captions of test people.
        mismatched: Probability that the captions of a training picture describe a picture of somebody else.
        posters: Share of the generic scenes that show a poster of a person: with some, scenes alone use every word.
    """

    seed: int
    hardness: float
    siblings: int
    coverage: float
    wrong: float
    instance: float = 0.0
    cameras: int = CAMERAS
    unseen_cameras: int = 0
    held_out: int = 0
    style: str = "mixed"
    test_style: str = "mixed"
    mismatched: float = 0.0
    posters: float = 0.0

    def parameters(self) -> dict[str, Any]:
        """Return the knobs as plain values; the later ones only where set, so that older trees stay up to date."""
        later = {item.name: item.default for item in fields(self) if item.default is not MISSING}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def identity(self, split: str, index: int) -> Identity:
        """Return an identity of this world."""
        return make_identity(self.seed, split, index, self.siblings, self.held_out)

    def moment(self, identity: Identity, camera: int, k: int) -> Moment | None:
        """Return what holds for one picture only, None in a world without instance-level content."""
        if not self.instance:
            return None
        return make_moment(self.seed, identity.key, identity.attributes, camera, k, self.instance)

    def picture(self, identity: Identity, camera: int, k: int) -> Picture:
        """Return a picture of an identity."""
        moment = self.moment(identity, camera, k)
        return render(self.seed, identity, camera, k, self.hardness, self.cameras, moment)

    def described(self, identity: Identity, camera: int, k: int) -> Identity:
        """Return whom the captions of a picture speak of: the person, or somebody else by `mismatched`."""
        if not self.mismatched or identity.split != "train":
            return identity
        draws = Draws(self.seed, _MISMATCH, identity.key, camera, k)
        if not draws.chance(self.mismatched):
            return identity
        return self.identity("train", identity.family * (self.siblings + 1) + 16 + draws.below(10_000))

    def captions(
        self, identity: Identity, camera: int, k: int, picture: Picture, count: int = CAPTIONS_PER_IMAGE
    ) -> list[Caption]:
        """Return the captions of a picture; those of a smaller `count` are the first ones of a larger."""
        spoken_of = self.described(identity, camera, k)
        if spoken_of is not identity:
            identity, picture = spoken_of, self.picture(spoken_of, camera, k)
        return [
            describe(
                Draws(self.seed, identity.key, camera, k, _CAPTION + number),
                identity, picture.view, picture.visible, self.coverage, self.wrong, instance=self.instance,
                moment=picture.moment, style=self.test_style if identity.split == "test" else self.style,
            )
            for number in range(count)
        ]  # fmt: skip

    def scene(self, draws: Draws) -> Scene:
        """Return the generic scene of a stream."""
        return make_scene(draws, self.hardness, self.posters, self.instance)

    def shots(self, identity: Identity, images: int) -> Iterator[tuple[int, int]]:
        """Yield (camera, k) of an identity's pictures: all its cameras in random order, then again."""
        order = Draws(self.seed, _ORDER, identity.key).shuffled(range(self.cameras))
        if self.unseen_cameras:
            known = self.cameras - self.unseen_cameras
            trained = identity.split in ("train", "val")
            order = [camera for camera in order if (camera < known) == trained]
        for position in range(images):
            yield order[position % len(order)], position // len(order)


@dataclass(frozen=True)
class ExportSpec:
    """Everything that decides an exported tree.

    Attributes:
        format: Raw format.
        world: The world.
        ids: Training identities; the number of pairs where a format knows no identities.
        test_ids: Test identities.
        val_ids: Validation identities.
        images: Pictures per identity.
        person_share: Generic pairs only: share of pairs that show pedestrians of another world.
    """

    format: str
    world: World
    ids: int
    test_ids: int
    val_ids: int
    images: int
    person_share: float

    def parameters(self) -> dict[str, object]:
        """Return the parameters as plain values, as stored in world.json."""
        return {**asdict(self), "world": self.world.parameters()}

    def people(self) -> list[tuple[int, str, int]]:
        """Return (number in the tree, split, position in the split) of every identity.

        Validation comes last: a person has the same number in trees with and without a validation split.
        """
        counts = (("train", self.ids), ("test", self.test_ids), ("val", self.val_ids))
        members = [(split, index) for split, count in counts for index in range(count)]
        return [(number, split, index) for number, (split, index) in enumerate(members, start=1)]
