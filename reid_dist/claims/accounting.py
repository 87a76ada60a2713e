"""What an arm costs, in three currencies, read from its resolved settings.

Equal compute is not one rule: a frozen second stage spends image passes that train no vision, and a joint stage halves
what each task sees. So every comparison says in which of three currencies its arms are equal:

- `total`: images that went through an image encoder, a momentum encoder's included;
- `task`: images that a loss of the compared task saw;
- `updates`: optimizer steps that changed the image tower.

What stands for models that others trained (`base`, `base-vit`, `i2i-scratch`) counts for no arm.
"""

from dataclasses import dataclass
from typing import Literal

from reid_dist.claims.arms import CAPTIONED, Task
from reid_dist.config import I2IStageConfig, RunConfig, StageConfig, T2IStageConfig

Accounting = Literal["total", "task", "updates"]
ACCOUNTINGS: dict[Accounting, str] = {
    "total": "equal image passes",
    "task": "equal passes of the task",
    "updates": "equal vision updates",
}


@dataclass(frozen=True)
class Cost:
    """Image passes by what they served, and updates of the image tower."""

    i2i: int = 0
    t2i: int = 0
    total: int = 0
    updates: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.i2i + other.i2i, self.t2i + other.t2i, self.total + other.total, self.updates + other.updates)

    def of(self, accounting: Accounting, task: Task) -> int:
        """The cost in one currency; `task` is the one that is compared."""
        if accounting == "task":
            return self.i2i if task == "i2i" else self.t2i
        return self.total if accounting == "total" else self.updates


def stage_cost(config: RunConfig, stage: StageConfig) -> Cost:
    """What one stage costs."""
    steps = config.stage_steps(stage)
    seen = steps * stage.data.global_batch_size
    captioned = round(seen * _captioned_share(stage))
    trains_vision = "visual" not in stage.freeze and stage.kind != "prompt"
    updates = steps if trains_vision else 0
    if not isinstance(stage, I2IStageConfig):
        keys = seen if isinstance(stage, T2IStageConfig) and stage.loss.queue_size else 0
        return Cost(0, seen, seen + keys, updates)
    text = captioned if stage.loss.text_weight else 0
    image = seen - captioned if stage.loss.image_rows == "uncaptioned" else seen
    return Cost(image, text, seen, updates)


def _captioned_share(stage: StageConfig) -> float:
    """Share of a stage's samples that have captions."""
    if len(stage.data.train) < 2:
        return float(stage.data.train == [CAPTIONED])
    if len(stage.data.weights) != len(stage.data.train):
        raise ValueError(f"stage {stage.name}: a mix of sets needs weights, or its shares are not known here")
    own = sum(w for name, w in zip(stage.data.train, stage.data.weights, strict=True) if name == CAPTIONED)
    return own / sum(stage.data.weights)


def equal_in(better: Cost, worse: Cost, task: Task) -> list[Accounting]:
    """The currencies in which two arms cost the same."""
    return [each for each in ACCOUNTINGS if better.of(each, task) == worse.of(each, task)]
