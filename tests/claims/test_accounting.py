"""What arms cost, counted by hand in images of a step."""

import pytest

from reid_dist.claims.accounting import Cost, equal_in, stage_cost
from reid_dist.claims.matrix import ARMS
from reid_dist.claims.running import Settings, arm_config, arm_stage

STEPS, BATCH = 100, 64
UNIT = STEPS * BATCH
SMALL = 16  # batch of the queue arms

# In units: I2I passes, T2I passes, all passes, and steps that update vision. Own stage only.
OWN = {
    "i2i": (1, 0, 1, 1),
    "i2i-half": (0.5, 0, 0.5, 0.5),
    "t2i-double": (0, 2, 2, 2),
    "joint": (0.5, 0.5, 1, 1),
    "joint-double": (1, 1, 2, 2),
    "i2i-text": (0, 1, 1, 0),
    "people": (1, 0, 1, 1),
    "people-joint": (1, 0.5, 1, 1),
    "anchors": (0.5, 0.5, 1, 1),
    "classifier": (1, 0.5, 1, 1),
    "prompt": (0, 0.75, 0.75, 0),
    "prompt-tune": (0, 1, 1, 1),
    "warm-64-queue": (0, 1, 2, 1),  # the key encoder sees every image once more
}
# With all that the arm starts from, but for base.
WHOLE = {
    "base": (0, 0, 0, 0),
    "words-unimodal": (0, 1, 1, 1),
    "i2i": (1, 0, 1, 1),
    "i2i-text": (1, 1, 2, 1),
    "i2i-tune": (1, 1, 2, 2),
    "joint-text": (0.5, 1.5, 2, 1),
    "i2i-warm-text": (1.5, 1.5, 3, 2),  # both towers' origins
    "prompt-tune": (0, 1.75, 1.75, 1),
    "direct-long": (0, 1.75, 1.75, 1.75),
}


def in_units(*units: float) -> Cost:
    i2i, t2i, total, updates = units
    return Cost(round(i2i * UNIT), round(t2i * UNIT), round(total * UNIT), round(updates * STEPS))


@pytest.mark.parametrize("name", OWN)
def test_a_stage_by_itself(settings: Settings, name: str) -> None:
    config = arm_config(settings, ARMS[name], 0)
    assert stage_cost(config, arm_stage(config)) == in_units(*OWN[name])


@pytest.mark.parametrize("name", WHOLE)
def test_an_arm_with_its_past(costs: dict[str, Cost], name: str) -> None:
    assert costs[name] == in_units(*WHOLE[name])


def test_small_batches_count_their_own_images(settings: Settings) -> None:
    config = arm_config(settings, ARMS["warm-queue-64"], 0)
    seen = 3 * STEPS * SMALL
    assert stage_cost(config, arm_stage(config)) == Cost(0, seen, 2 * seen, 3 * STEPS)


@pytest.mark.parametrize(
    ("better", "worse", "task", "expected"),
    [
        ("i2i-double", "joint-double", "i2i", ["total", "updates"]),
        ("i2i", "joint-double", "i2i", ["task"]),
        ("i2i-text", "joint-double", "t2i", ["total", "task"]),
        ("i2i-text", "joint", "i2i", ["updates"]),
        ("i2i-tune", "t2i-double", "unseen", ["total", "updates"]),
        ("i2i-tune", "t2i", "t2i", ["task"]),
        ("joint-text", "i2i-text-long", "t2i", ["task", "updates"]),
        ("prompt-tune", "direct-long", "t2i", ["total", "task"]),
        ("prompt-tune", "direct", "t2i", ["updates"]),
        ("warm-queue-1024", "warm-pair", "t2i", ["task", "updates"]),
        ("warm-queue-1024", "warm-pair-long", "t2i", ["total"]),
        ("joint-dual", "joint-double", "i2i", ["total", "task", "updates"]),
    ],
)
def test_in_which_currencies_arms_are_equal(
    costs: dict[str, Cost], better: str, worse: str, task: str, expected: list[str]
) -> None:
    assert equal_in(costs[better], costs[worse], task) == expected


def test_a_mix_without_weights_is_refused(settings: Settings) -> None:
    config = arm_config(settings, ARMS["joint"], 0)
    stage = arm_stage(config)
    stage = stage.model_copy(update={"data": stage.data.model_copy(update={"weights": []})})
    with pytest.raises(ValueError, match="needs weights"):
        stage_cost(config, stage)
