import itertools
import math

import pytest
import torch
from torch import nn

from reid_dist.config import OptimizerConfig, OptimizerRule
from reid_dist.optim import TrainableGroup, build_optimizer, lr_factor, parameter_groups, set_learning_rate

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.02, new_lr_multiplier=5, bias_lr_multiplier=2)


def make_trainable() -> list[TrainableGroup]:
    old = {
        "encoder.visual.conv.weight": nn.Parameter(torch.ones(2, 3, 1, 1)),
        "encoder.visual.conv.bias": nn.Parameter(torch.ones(2)),
        "encoder.visual.norm.weight": nn.Parameter(torch.ones(2)),
        "encoder.visual.class_embedding": nn.Parameter(torch.ones(4)),
        "encoder.visual.positional_embedding": nn.Parameter(torch.ones(3, 4)),
        "encoder.text.attn.in_proj_bias": nn.Parameter(torch.ones(6)),
        "encoder.logit_scale": nn.Parameter(torch.ones(1)),
    }
    new = {
        "head.neck.weight": nn.Parameter(torch.ones(4)),
        "head.classifier.weight": nn.Parameter(torch.ones(7, 4)),
        "head.classifier.bias": nn.Parameter(torch.ones(7)),
    }
    return [TrainableGroup(False, old), TrainableGroup(True, new)]


def by_name(config: OptimizerConfig = CONFIG) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of every parameter."""
    groups = parameter_groups(make_trainable(), config)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [
        ("encoder.visual.conv.weight", 0.1, 0.02),
        ("encoder.visual.conv.bias", 0.2, 0.0),
        ("encoder.visual.norm.weight", 0.1, 0.0),
        ("encoder.visual.class_embedding", 0.1, 0.0),
        ("encoder.visual.positional_embedding", 0.1, 0.02),
        ("encoder.text.attn.in_proj_bias", 0.2, 0.0),
        ("encoder.logit_scale", 0.1, 0.0),
        ("head.neck.weight", 0.5, 0.0),
        ("head.classifier.weight", 0.5, 0.02),
        ("head.classifier.bias", 1.0, 0.0),
    ],
)
def test_learning_rate_and_decay_follow_from_what_a_parameter_is(name: str, lr: float, weight_decay: float) -> None:
    assert by_name()[name] == (pytest.approx(lr), weight_decay)


IRRA = OptimizerConfig(
    name="adam",
    lr=0.1,
    weight_decay=0.02,
    rules=[
        OptimizerRule(contains=["cross"], lr=5),
        OptimizerRule(contains=["bias"], lr=2, weight_decay=0),
        OptimizerRule(contains=["classifier", "mlm_head"], lr=5),
    ],
)


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [
        ("visual.conv1.weight", 1, 0.02),
        ("visual.ln_pre.weight", 1, 0.02),  # norms decay too
        ("visual.class_embedding", 1, 0.02),
        ("text.attn.in_proj_bias", 2, 0),
        ("cross_attn.in_proj_weight", 5, 0.02),
        ("cross_attn.in_proj_bias", 2, 0),  # the later rule replaces: neither 5 nor 10
        ("ln_post.weight", 1, 0.02),
        ("ln_post.bias", 2, 0),
        ("classifier.weight", 5, 0.02),
        ("classifier.bias", 5, 0),  # the last rule says nothing of decay
        ("mlm_head.fc.bias", 5, 0),
    ],
)
@pytest.mark.parametrize("new", [False, True])
def test_rules_replace_each_other_in_order(name: str, lr: float, weight_decay: float, new: bool) -> None:
    """Expected by hand from IRRA's code (methods.md A5)."""
    (group,) = parameter_groups([TrainableGroup(new, {name: nn.Parameter(torch.ones(3))})], IRRA)
    assert group["lr"] == group["base_lr"] == pytest.approx(0.1 * lr)
    assert group["weight_decay"] == weight_decay


def test_every_parameter_is_in_one_group_beside_its_name() -> None:
    trainable = make_trainable()
    groups = parameter_groups(trainable, CONFIG)
    named = {name: p for group in trainable for name, p in group.parameters.items()}
    pairs = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
    assert len(pairs) == len(named) and all(named[name] is parameter for name, parameter in pairs)


def test_there_are_no_empty_groups() -> None:
    assert parameter_groups([TrainableGroup(True, {})], CONFIG) == []
    plain = OptimizerConfig(lr=0.1, weight_decay=0.0)
    assert len(parameter_groups(make_trainable(), plain)) == 1  # all alike


def test_a_partitioned_parameter_decays_by_its_whole_shape() -> None:
    """Under ZeRO 3 the tensor itself is an empty placeholder; its shape stands in ds_shape."""
    matrix = nn.Parameter(torch.empty(0))
    matrix.ds_shape = torch.Size([3, 4])  # type: ignore[attr-defined]
    (group,) = parameter_groups([TrainableGroup(False, {"a.weight": matrix})], CONFIG)
    assert group["weight_decay"] == 0.02


def test_optimizers_get_their_settings() -> None:
    groups = parameter_groups(make_trainable(), CONFIG)
    adamw = build_optimizer(groups, OptimizerConfig(name="adamw", betas=(0.8, 0.95), eps=1e-6))
    assert isinstance(adamw, torch.optim.AdamW)
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in adamw.param_groups)
    sgd = build_optimizer(parameter_groups(make_trainable(), CONFIG), OptimizerConfig(name="sgd", momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.7 for group in sgd.param_groups)
    assert {group["weight_decay"] for group in sgd.param_groups} == {0.0, 0.02}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weight_decay_of_adam_is_part_of_the_gradient_and_of_adamw_is_not(name: str) -> None:
    """Two steps by hand (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2)."""
    lr, decay, (beta_1, beta_2), eps = 0.1, 0.3, (0.9, 0.999), 1e-3
    config = OptimizerConfig(name=name, lr=lr, weight_decay=decay, betas=(beta_1, beta_2), eps=eps)  # type: ignore[arg-type]
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = build_optimizer(parameter_groups([TrainableGroup(False, {"a.weight": weight})], config), config)
    expected, first, second = 2.0, 0.0, 0.0
    for step, slope in enumerate((0.5, -1.5), start=1):
        weight.grad = torch.tensor([[slope]], dtype=torch.float64)
        optimizer.step()
        gradient = slope + (decay * expected if name == "adam" else 0.0)
        expected -= lr * decay * expected if name == "adamw" else 0.0
        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        mean, spread = first / (1 - beta_1**step), (second / (1 - beta_2**step)) ** 0.5
        expected -= lr * mean / (spread + eps)
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-12)


def test_setting_the_learning_rate_keeps_the_ratios_between_groups() -> None:
    optimizer = build_optimizer(parameter_groups(make_trainable(), CONFIG), CONFIG)
    before = [group["lr"] for group in optimizer.param_groups]
    for factor in (0.5, 0.25, 1.0):  # each from the base, not from the last
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * factor for lr in before])


# Schedules: steps are 0-based, 100 of them, 10 of warm-up.


def schedule(name: str, **settings: object) -> list[float]:
    config = OptimizerConfig(schedule=name, warmup_steps=10, warmup_start=0.2, **settings)  # type: ignore[arg-type]
    return [lr_factor(config, step, 100) for step in range(100)]


@pytest.mark.parametrize("name", ["cosine", "multistep", "constant"])
def test_warmup_is_linear_from_its_start_to_one(name: str) -> None:
    factors = schedule(name)
    assert factors[0] == pytest.approx(0.2)
    assert factors[5] == pytest.approx(0.6)
    assert factors[9] == pytest.approx(0.2 + 0.8 * 0.9)
    assert factors[10] == pytest.approx(1.0)
    assert max(factors) == pytest.approx(1.0)


def test_cosine_falls_from_one_to_just_above_zero_after_warmup() -> None:
    factors = schedule("cosine")
    for step in (10, 33, 55, 99):
        assert factors[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 10) / 90)))
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_multistep_multiplies_at_each_milestone() -> None:
    factors = schedule("multistep", milestones=[30, 60], gamma=0.1)
    assert (factors[29], factors[30], factors[59], factors[60], factors[99]) == pytest.approx((1, 0.1, 0.1, 0.01, 0.01))


def test_constant_stays_at_one() -> None:
    assert set(schedule("constant")[10:]) == {1.0}


@pytest.mark.parametrize("name", ["cosine", "multistep", "constant"])
def test_without_warmup_the_first_step_is_whole(name: str) -> None:
    assert lr_factor(OptimizerConfig(schedule=name), 0, 100) == 1.0  # type: ignore[arg-type]
    assert lr_factor(OptimizerConfig(schedule=name), 0, 1) == 1.0  # type: ignore[arg-type]


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    config = OptimizerConfig(warmup_steps=10, warmup_start=0.0)
    assert [lr_factor(config, step, 5) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_an_epoch_s_schedule_is_irra_s() -> None:
    """A5: 60 epochs, 5 of warm-up from 0.1, cosine to 0; constant inside an epoch. Here an epoch is of 7 steps."""
    config = OptimizerConfig(schedule="cosine", warmup_steps=35, warmup_start=0.1, schedule_every=7)
    for step in range(420):
        epoch = step // 7
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 55))
        assert lr_factor(config, step, 420) == pytest.approx(0.1 + 0.9 * epoch / 5 if epoch < 5 else cosine), step
    assert lr_factor(config, 35, 420) == 1.0 and lr_factor(config, 419, 420) > 1e-4


def test_an_epoch_s_schedule_is_textreid_s() -> None:
    """3.6: 80 epochs, x 0.1 from epochs 40 and 70, factor 0.1 + 0.9 e / 5 in epochs 0..4."""
    config = OptimizerConfig(
        schedule="multistep", warmup_steps=15, warmup_start=0.1, milestones=[120, 210], gamma=0.1, schedule_every=3
    )
    expected = [0.1, 0.28, 0.46, 0.64, 0.82, *[1.0] * 35, *[0.1] * 30, *[0.01] * 10]
    assert [lr_factor(config, step, 240) for step in range(240)] == pytest.approx([x for x in expected for _ in "abc"])


def test_a_last_epoch_that_is_cut_short_counts_as_one() -> None:
    config = OptimizerConfig(schedule="cosine", schedule_every=10)
    assert [lr_factor(config, step, 31) for step in range(31)] == [lr_factor(config, step, 40) for step in range(31)]
