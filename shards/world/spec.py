"""Parameters of a world and of an export, the named levels, and who belongs to which split."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from shards.world.camera import CAMERAS, Picture, render
from shards.world.captions import Caption, describe
from shards.world.draws import Draws
from shards.world.identity import Identity, make_identity

CAPTIONS_PER_IMAGE = 2
QUERIES_PER_IDENTITY = 3
_ORDER, _CAPTION = 301, 302

LEVELS: dict[str, dict[str, float]] = {
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
    """

    seed: int
    hardness: float
    siblings: int
    coverage: float
    wrong: float

    def identity(self, split: str, index: int) -> Identity:
        """Return an identity of this world."""
        return make_identity(self.seed, split, index, self.siblings)

    def picture(self, identity: Identity, camera: int, k: int) -> Picture:
        """Return a picture of an identity."""
        return render(self.seed, identity, camera, k, self.hardness)

    def captions(self, identity: Identity, camera: int, k: int, picture: Picture) -> list[Caption]:
        """Return the captions of a picture."""
        return [
            describe(
                Draws(self.seed, identity.key, camera, k, _CAPTION + number),
                identity, picture.view, picture.visible, self.coverage, self.wrong,
            )
            for number in range(CAPTIONS_PER_IMAGE)
        ]  # fmt: skip

    def shots(self, identity: Identity, images: int) -> Iterator[tuple[int, int]]:
        """Yield (camera, k) of an identity's pictures: all cameras in random order, then again."""
        order = Draws(self.seed, _ORDER, identity.key).shuffled(range(CAMERAS))
        for position in range(images):
            yield order[position % CAMERAS], position // CAMERAS


@dataclass(frozen=True)
class ExportSpec:
    """Everything that decides an exported tree.

    Attributes:
        format: Raw format.
        world: The world.
        ids: Training identities; for img2dataset the number of pairs.
        test_ids: Test identities.
        val_ids: Validation identities.
        images: Pictures per identity.
        person_share: img2dataset only: share of pairs that show pedestrians of another world.
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
        return asdict(self)

    def people(self) -> list[tuple[int, str, int]]:
        """Return (number in the tree, split, position in the split) of every identity.

        Validation comes last: a person has the same number in trees with and without a validation split.
        """
        counts = (("train", self.ids), ("test", self.test_ids), ("val", self.val_ids))
        members = [(split, index) for split, count in counts for index in range(count)]
        return [(number, split, index) for number, (split, index) in enumerate(members, start=1)]
