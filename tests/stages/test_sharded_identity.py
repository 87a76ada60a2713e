"""The sharded head in the i2i stage: cached gradients, skipped steps, gradient cosines, its optimizer's settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reid_dist.config import I2ILoss, I2IStageConfig, OptimizerConfig
from reid_dist.models.sharded_classifier import ShardedClassifier
from reid_dist.optim import parameter_groups
from reid_dist.stages import I2IStage, Surroundings, build_stage
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.contract import Batch
from reid_dist.stages.sharded_identity import row_optimizer

IDENTITIES, ROWS, PARTS = 19, 4, 3


def make_stage(make_encoder: Callable, rate: float = 1.0, **settings: Any) -> I2IStage:
    torch.manual_seed(1)
    loss = I2ILoss(sharded_classifier=True, sampling_rate=rate, **settings)
    config = I2IStageConfig(name="i2i", kind="i2i", steps=0, loss=loss)
    stage = build_stage(config, make_encoder(), Surroundings(identities=IDENTITIES))
    assert isinstance(stage, I2IStage) and stage.sharded is not None
    stage.sharded.weight_SD.mul_(100)  # a softmax that is not flat
    return stage.train()


def centres(stage: I2IStage) -> ShardedClassifier:
    assert stage.sharded is not None
    return stage.sharded


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(3, 49, (PARTS, ROWS, 8), generator=generator)
    token[:, :, 7] = 49
    image = torch.randint(0, 256, (PARTS, ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8)
    pid = torch.randint(0, IDENTITIES, (PARTS, ROWS), generator=generator)
    return [{"image_BCHW": image[i], "token_BL": token[i], "pid_B": pid[i]} for i in range(PARTS)]


def gradients(stage: I2IStage) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    (leaf,) = stage.leaves()
    assert leaf.grad is not None
    return {**found, "centres": leaf.grad}


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_cached_gradients_are_those_of_the_big_batch(rate: float, make_encoder: Callable) -> None:
    stages = [make_stage(make_encoder, rate).double() for _ in range(2)]
    batches = [stage.prepare(make_batches()) for stage in stages]
    parts = [stages[0].features(batch, {}) for batch in batches[0]]
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss, _ = stages[0].loss(features, {"pid_B": torch.cat([batch["pid_B"] for batch in batches[0]])}, [{}])
    loss.backward()
    passes = [first_pass(stages[1], batch) for batch in batches[1]]
    cached = joint_gradients(stages[1], [{"pid_B": batch["pid_B"]} for batch in batches[1]], passes)
    for index, (batch, first) in enumerate(zip(batches[1], passes, strict=True)):
        (surrogate(stages[1], batch, first, cached, index) / PARTS).backward()
    assert float(cached.loss) == pytest.approx(float(loss.detach()), rel=1e-10)
    expected, found = gradients(stages[0]), gradients(stages[1])
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        tolerance = 1e-6 if name == "centres" else 1e-9  # the centres are fp32 here too
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-11, name


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_skipped_step_changes_nothing(rate: float, make_encoder: Callable) -> None:
    stage = make_stage(make_encoder, rate)
    digests = [int(centres(stage).digest())]
    for updated in (False, True):
        (batch, *_) = stage.prepare(make_batches())
        stage(batch)["loss"].backward()
        stage.after_step([{}], updated, lambda names: [])
        digests.append(int(centres(stage).digest()))
        assert stage.leaves() == []
    assert digests[0] == digests[1] != digests[2]


def test_the_factor_of_the_schedule_reaches_the_centres(make_encoder: Callable) -> None:
    moved = []
    for factor in (0.0, 1.0, 3.0):
        stage = make_stage(make_encoder)
        before = centres(stage).weight_SD.clone()
        stage.set_learning_rate(factor)
        (batch, *_) = stage.prepare(make_batches())
        stage(batch)["loss"].backward()
        stage.after_step([{}], True, lambda names: [])
        moved.append(float((centres(stage).weight_SD - before).norm()))
    assert moved[0] == 0 and moved[2] == pytest.approx(3 * moved[1], rel=0.02)


def test_gradient_cosines_leave_the_centres_gradient_alone(make_encoder: Callable) -> None:
    found = []
    for every in (0, 1):
        stage = make_stage(make_encoder, text_weight=0.5, conflict_every=every)
        (batch, *_) = stage.prepare(make_batches())
        output = stage(batch)
        assert ("conflict/all" in output["metrics"]) == bool(every)
        output["loss"].backward()
        found.append(gradients(stage)["centres"])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_text_loss_can_share_the_centres(make_encoder: Callable) -> None:
    text = {"contrastive_weight": 0.0, "identity_weight": 1.0, "classifier": "shared"}
    stage = make_stage(make_encoder, 0.3, text_weight=0.5, text=text)
    (batch, *_) = stage.prepare(make_batches())
    loss, parts = stage.loss(stage.features(batch, {}), batch, [{}])
    assert parts["text_identity"] != parts["identity"] and parts["text_identity"].isfinite()
    together = torch.autograd.grad(loss, stage.leaves(), retain_graph=True)[0]
    alone = torch.autograd.grad(parts["identity"] + 0.5 * parts["text_identity"], stage.leaves())[0]
    torch.testing.assert_close(together, alone)


SETTINGS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-4, "weight_decay": 0.3, "betas": (0.8, 0.9), "new_lr_multiplier": 5.0},
    {"name": "adam", "lr": 1e-4, "eps": 1e-6, "rules": [{"contains": ["classifier"], "lr": 7.0, "weight_decay": 0.1}]},
    {"name": "sgd", "lr": 1e-2, "momentum": 0.8, "weight_decay": 0.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["name"])
def test_the_settings_are_those_of_the_dense_classifier(settings: dict[str, Any], make_encoder: Callable) -> None:
    config = OptimizerConfig.model_validate(settings)
    dense = I2IStage(make_encoder(), I2ILoss(), run=Surroundings(identities=IDENTITIES))
    groups = parameter_groups(dense.trainable(), config)
    (group,) = [group for group in groups if "image_losses.head.classifier.weight" in group["names"]]
    found = row_optimizer(config)
    assert (found.lr, found.weight_decay) == (group["lr"], group["weight_decay"])
    assert (found.name, found.eps, found.momentum) == (config.name, config.eps, config.momentum)
    assert found.betas == config.betas


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_dry_run_runs_it_without_values(rate: float, make_encoder: Callable) -> None:
    encoder = make_encoder()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        stage = make_stage(lambda: encoder, rate)
        saved: list[Tensor] = []
        batch = {name: mode.from_tensor(x) for name, x in make_batches()[0].items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss, _ = stage.loss({"i2i_BD": torch.zeros(ROWS, 12, requires_grad=True)}, batch, [{}])
    assert loss.shape == ()
    logits = ROWS * (IDENTITIES if rate == 1 else 6)
    assert logits in {x.numel() for x in saved}
    assert max(x.numel() for x in saved) < IDENTITIES * 12  # no class centres: `bytes_beside` has them
    assert stage.bytes_beside(1) > 3 * IDENTITIES * 12 * 4
