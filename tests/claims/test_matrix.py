"""The experiments as they are defined: complete, closed, loadable, and equal in what they are compared by."""

from pathlib import Path

import pytest
import torch
from torch import nn

from reid_dist.claims.accounting import ACCOUNTINGS, Cost, equal_in
from reid_dist.claims.arms import TASKS, Arm, arms_of, chains
from reid_dist.claims.matrix import ARMS, CLAIMS, SHARED, find_claims
from reid_dist.claims.running import Settings, arm_config, arm_stage
from reid_dist.config import I2IStageConfig, RunConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.optim import TrainableGroup, parameter_groups

NAMES = ["C1", "C2", "C3", "C4", "H2", "P1", "P2", "P3", "D1", "D2", "D3", "D4", "D5"]


def test_every_claim_of_the_three_papers_and_of_hpl_is_there() -> None:
    assert [claim.name for claim in CLAIMS] == NAMES


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_the_rows_of_a_claim_name_arms_that_are_scored_so(claim) -> None:
    for row in claim.rows:
        assert row.task in ARMS[row.better].scored
        assert (row.worse_task or row.task) in ARMS[row.worse].scored
        assert (row.better, row.task) != (row.worse, row.worse_task or row.task)
    assert any(row.decides and row.setting == claim.rows[0].setting for row in claim.rows)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_is_decided_at_equal_image_passes(claim, costs: dict[str, Cost]) -> None:
    first = [row for row in claim.rows if row.setting == claim.rows[0].setting and row.decides]
    equal = [equal_in(costs[row.better], costs[row.worse], row.task) for row in first]
    assert any("total" in each for each in equal), equal
    for row, currencies in zip(first, equal, strict=True):
        assert currencies, f"{row.better} and {row.worse} are equal in nothing"


@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4"])
def test_conflict_claims_have_three_accountings_and_both_text_targets(name: str, costs: dict[str, Cost]) -> None:
    (claim,) = find_claims([name])
    by_setting: dict[str, set[str]] = {}
    for row in claim.rows:
        by_setting.setdefault(row.setting, set()).update(equal_in(costs[row.better], costs[row.worse], row.task))
    assert by_setting["identity-aware text targets"] == set(ACCOUNTINGS)
    assert by_setting["pairwise text targets"] == set(ACCOUNTINGS)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe_that_loads(name: str, settings: Settings) -> None:
    config = arm_config(settings, ARMS[name], 3)
    stage = arm_stage(config)
    assert config.seed == 3
    assert stage.steps == max(1, round(100 * ARMS[name].length))
    assert config.stages[0].steps == 0 and not config.stages[0].evaluation.t2i
    assert bool(stage.evaluation.i2i) == ("i2i" in ARMS[name].scored)
    if ARMS[name].weights:
        assert config.model.weights == str(settings.export(ARMS[name].weights, 3))


def test_prompts_go_into_as_many_blocks_as_there_are(settings: Settings) -> None:
    deep, shallow = (arm_config(settings, ARMS[name], 0).model for name in ("prompt", "prompt-shallow"))
    assert deep.architecture == "configs/models/vit_tiny.json"  # the recipe's own tower has no blocks
    assert (deep.prompts.visual_depth, deep.prompts.text_depth) == (4, 2)
    assert (shallow.prompts.visual_depth, shallow.prompts.text_depth) == (1, 1)
    large = Settings(Path("configs/claims_gpu.yaml"), (), settings.folder, settings.level, settings.sizes)
    model = arm_config(large, ARMS["prompt"], 0).model
    assert model.architecture == "configs/models/vit_small_p8.json"
    assert (model.prompts.visual_depth, model.prompts.text_depth) == (12, 6)


@pytest.mark.parametrize("recipe", ["configs/claims.yaml", "configs/claims_gpu.yaml"])
def test_the_arm_of_a_slow_text_tower_decays_what_the_others_decay(settings: Settings, recipe: str) -> None:
    settings = Settings(Path(recipe), (), settings.folder, settings.level, settings.sizes)
    slow, plain = (arm_config(settings, ARMS[name], 0) for name in ("transfer-slow", "t2i"))
    encoder = build_dual_encoder(plain.model.model_copy(update={"weights": None, "vocabulary": None}))
    groups = [TrainableGroup(False, dict(encoder.named_parameters()))]

    def rates(config: RunConfig) -> dict[str, tuple[float, float]]:
        found = parameter_groups(groups, arm_stage(config).optimizer)
        return {name: (group["lr"], group["weight_decay"]) for group in found for name in group["names"]}

    expected = {
        name: (lr * (0.2 if name.startswith("text.") else 1), decay) for name, (lr, decay) in rates(plain).items()
    }
    assert rates(slow) == expected


def test_one_temperature_sampler_and_rate_for_all_arms_that_are_compared_with_each_other(settings: Settings) -> None:
    """What must not differ by accident: it would be taken for the effect."""
    for arm in ARMS.values():
        stage = arm_stage(arm_config(settings, arm, 0))
        if isinstance(stage, I2IStageConfig) and not stage.loss.text_weight:
            continue
        loss = stage.loss.text if isinstance(stage, I2IStageConfig) else stage.loss
        assert loss.temperature == 0.07, arm.name
    base = arm_stage(arm_config(settings, ARMS["t2i"], 0)).model_dump()
    for name in ("i2i", "joint-double", "i2i-text", "prompt-tune", "words", "words-learned", "classifier"):
        stage = arm_stage(arm_config(settings, ARMS[name], 0)).model_dump()
        assert stage["optimizer"] == base["optimizer"], name
        assert {**stage["data"], "train": 0, "weights": 0} == {**base["data"], "train": 0, "weights": 0}, name
    for better, worse in (("warm-queue-1024", "warm-pair"), ("scratch-queue-64", "scratch-pair")):
        one, other = (arm_stage(arm_config(settings, ARMS[name], 0)).model_dump() for name in (better, worse))
        assert {**one, "loss": 0} == {**other, "loss": 0}


def test_prompts_learn_at_one_rate_alone_and_beside_the_towers(settings: Settings) -> None:
    alone, beside, towers = (
        arm_stage(arm_config(settings, ARMS[name], 0)).optimizer for name in ("prompt", "prompt-joint", "direct-long")
    )
    one = TrainableGroup(True, {"visual.prompts": nn.Parameter(torch.zeros(2, 2))})
    rates = [
        (group["lr"], group["weight_decay"]) for each in (alone, beside) for group in parameter_groups([one], each)
    ]
    assert rates[0] == pytest.approx(rates[1]) and beside.lr == towers.lr


def test_every_arm_serves_a_claim_and_comes_behind_what_it_needs() -> None:
    order = [arm.name for arm in arms_of(CLAIMS, ARMS)]
    assert sorted(order) == sorted(ARMS)
    for arm in ARMS.values():
        assert all(order.index(needed) < order.index(arm.name) for needed in arm.needs)


def test_the_short_version_is_closed_and_small() -> None:
    fast = arms_of(CLAIMS, ARMS, fast=True)
    assert all(arm.fast for arm in fast), [arm.name for arm in fast if not arm.fast]
    assert sum(arm.length for arm in fast) < 0.2 * sum(arm.length for arm in ARMS.values())


def test_chains_are_closed_and_ordered() -> None:
    arms = arms_of(CLAIMS, ARMS)
    found = chains(arms, SHARED)
    assert sorted(arm.name for chain in found for arm in chain) == sorted(ARMS.keys() - set(SHARED))
    for chain in found:
        names = [arm.name for arm in chain]
        for place, arm in enumerate(chain):
            assert set(arm.needs) - set(SHARED) <= set(names[:place])
    lengths = [sum(arm.length for arm in chain) for chain in found]
    assert lengths == sorted(lengths, reverse=True)


def test_an_arm_that_needs_two_joins_their_chains() -> None:
    a, b, alone = (Arm(name, "", {}, weights="base") for name in "abc")
    both = Arm("both", "", {}, weights="a", visual="b")
    later = Arm("later", "", {}, weights="both")
    found = [[arm.name for arm in chain] for chain in chains([a, b, alone, both, later], ["base"])]
    assert found == [["a", "b", "both", "later"], ["c"]]


def test_unknown_claims_are_told() -> None:
    with pytest.raises(UserError, match=r"--only C9: no such claim; there are C1, C2"):
        find_claims(["C1", "C9"])
    assert find_claims([]) == list(CLAIMS)
    assert [claim.name for claim in find_claims(["D1", "C1"])] == ["C1", "D1"]


def test_a_wrong_setting_of_an_arm_names_the_arm(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"^arm wrong: .*unknown key stages.train.freeez"):
        arm_config(settings, Arm("wrong", "", {"freeez": ["text"]}), 0)


def test_what_stands_for_models_of_others_is_equally_long() -> None:
    assert len({ARMS[name].length for name in SHARED}) == 1
    assert all(not ARMS[name].needs for name in SHARED)


def test_tasks_have_names() -> None:
    assert {task for arm in ARMS.values() for task in arm.scored} == set(TASKS)
