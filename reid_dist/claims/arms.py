"""What an arm of an experiment and a claim about arms are."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["t2i", "i2i", "unseen", "reranked"]
TASKS: dict[Task, str] = {
    "t2i": "T2I",
    "i2i": "I2I",
    "unseen": "T2I on cameras that no training saw",
    "reranked": "T2I, re-ranked",
}
# The sets of a world, by what they are for.
CAPTIONED, IMAGES, GENERIC, UNSEEN = "cuhk_pedes", "market1501", "generic", "cuhk_unseen"


@dataclass(frozen=True)
class Arm:
    """One training run: the recipe's stage `train`, changed.

    Attributes:
        name: of its folder.
        about: what it is, for the report.
        stage: settings of the stage that differ from the recipe's.
        model: settings of the model that differ from the recipe's.
        length: optimizer steps, as a multiple of the recipe's.
        weights: the arm that it starts from; None: random weights.
        visual: the arm whose image tower it takes, over those of `weights`.
        dictionary: the arm whose text tower makes its word vectors.
        transformer: needs an image tower of blocks: the recipe's, or a small ViT where that has none. Prompts go into
            as many blocks as there are.
        scored: what it is evaluated on.
        fast: part of the short version.
    """

    name: str
    about: str
    stage: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    weights: str | None = "base"
    visual: str | None = None
    dictionary: str | None = None
    transformer: bool = False
    scored: tuple[Task, ...] = ("t2i", "i2i")
    fast: bool = False

    @property
    def needs(self) -> list[str]:
        """The arms that must be finished before it starts."""
        return [name for name in dict.fromkeys((self.weights, self.visual, self.dictionary)) if name is not None]


@dataclass(frozen=True)
class Row:
    """A comparison on which a claim rests: `better` is said to score above `worse`.

    Attributes:
        setting: rows of one setting are judged together; the first setting of a claim decides it.
        better: an arm.
        worse: the arm it is compared with; the same one where only the task differs.
        task: what is scored.
        worse_task: what `worse` is scored on, where that differs.
        decides: False for a row that explains.
    """

    setting: str
    better: str
    worse: str
    task: Task = "t2i"
    worse_task: Task | None = None
    decides: bool = True


@dataclass(frozen=True)
class Claim:
    """A published claim.

    Attributes:
        name: C1, P1 ...
        text: what is claimed.
        source: where.
        rule: whether all rows must hold, or one.
        rows: the comparisons.
        differs: what is different from the paper's setting.
    """

    name: str
    text: str
    source: str
    rule: Literal["all", "any"]
    rows: tuple[Row, ...]
    differs: str


def arms_of(claims: Iterable[Claim], arms: Mapping[str, Arm], fast: bool = False) -> list[Arm]:
    """The arms that claims rest on, with all that these start from, each behind what it needs.

    Args:
        claims: the claims.
        arms: every arm by its name.
        fast: leave out the arms that the short version does without.
    """
    found: dict[str, Arm] = {}

    def add(name: str) -> None:
        for needed in arms[name].needs:
            add(needed)
        found.setdefault(name, arms[name])

    for row in (row for claim in claims for row in claim.rows):
        for name in (row.better, row.worse):
            if arms[name].fast or not fast:
                add(name)
    return list(found.values())


def chains(arms: Collection[Arm], shared: Collection[str]) -> list[list[Arm]]:
    """Groups of arms that start from nothing but each other and the `shared` ones; longest first.

    A group keeps the order of its arms, so it can be run from beginning to end by one process.
    """
    groups: list[list[Arm]] = []
    for arm in (arm for arm in arms if arm.name not in shared):
        joined = [group for group in groups if any(other.name in arm.needs for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(member for group in joined for member in group), arm])
    return sorted(groups, key=lambda group: -sum(arm.length for arm in group))
