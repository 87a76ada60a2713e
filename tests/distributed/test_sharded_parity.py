"""The i2i stage with a sharded classifier under the engine beside the dense one in a plain process.

At rate 1 the losses, the towers and the class centres of every step agree within 1e-5 relative norm, for every ZeRO
stage, with accumulation, cached gradients and clipping; below rate 1 several ranks agree with one.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch

from reid_dist.config import EngineConfig, I2ILoss, I2IStageConfig, ModelConfig, OptimizerConfig
from reid_dist.distributed import all_gather_ragged, rank, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.optim import build_optimizer, parameter_groups, set_learning_rate
from reid_dist.stages import I2IStage, Stage, Surroundings, build_stage
from reid_dist.stages.contract import Batch
from tests.distributed.steps import make_step

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "row_conv_tiny.json")
ROWS, IDENTITIES, TOLERANCE = 16, 27, 1e-5
FACTORS = (0.5, 1.0, 0.7)
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", lr=0.02, weight_decay=0.01, new_lr_multiplier=5.0),
    # Weights whose gradient is zero in theory would follow its rounding under Adam, unless eps is above that.
    "adamw": OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.1, eps=1e-3, new_lr_multiplier=5.0),
}


class Case(NamedTuple):
    zero_stage: int = 1
    micro_steps: int = 1
    cached: bool = False
    precision: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    rate: float = 1.0
    max_norm: float = 0.0
    optimizer: str = "sgd"
    text_weight: float = 0.0


def make_config(case: Case, sharded: bool = True) -> I2IStageConfig:
    text = {"contrastive_weight": 0.5, "identity_weight": 1.0, "classifier": "shared"}
    loss = {
        "sharded_classifier": sharded,
        "sampling_rate": case.rate if sharded else 1.0,
        "text_weight": case.text_weight,
        **({"text": text} if case.text_weight else {}),
    }
    engine = EngineConfig(
        zero_stage=case.zero_stage,
        precision=case.precision,
        gradient_accumulation_steps=case.micro_steps,
        cached_gradients=case.cached,
        max_grad_norm=case.max_norm,
    )
    return I2IStageConfig(
        name="i2i",
        kind="i2i",
        steps=0,
        loss=I2ILoss.model_validate(loss),
        engine=engine,
        optimizer=OPTIMIZERS[case.optimizer],
    )


def make_stage(case: Case, sharded: bool = True) -> I2IStage:
    torch.manual_seed(1)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    stage = build_stage(make_config(case, sharded), encoder, Surroundings(seed=2, identities=IDENTITIES))
    assert isinstance(stage, I2IStage)
    return stage.train()


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    token = torch.randint(3, 400, (ROWS, 40), generator=generator)
    token[:, -1] = 511
    return {
        "image_BCHW": torch.randint(0, 256, (ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.randint(0, IDENTITIES, (ROWS,), generator=generator),
        "sample_id_B": torch.arange(ROWS),
    }


def own_rows(batch: Batch, micro_steps: int, owner: int = 0, owners: int = 1) -> list[Batch]:
    """Micro-batch after micro-batch, in each of them rank after rank."""
    rows = ROWS // micro_steps // owners
    starts = [(micro_step * owners + owner) * rows for micro_step in range(micro_steps)]
    return [{name: x[start : start + rows] for name, x in batch.items()} for start in starts]


def train(case: Case) -> dict[str, Any]:
    stage, config = make_stage(case), make_config(case)
    engine = DeepSpeedEngine(stage, config.engine, config.optimizer, ROWS // case.micro_steps // world_size())
    stage.start(engine.exact_parameters)
    losses, centres = [], []
    for step, factor in enumerate(FACTORS):
        engine.set_learning_rate(factor)
        stage.set_learning_rate(factor)
        micro_batches = stage.prepare(own_rows(make_batch(step), case.micro_steps, rank(), world_size()))
        made, loss = make_step(engine, step, micro_batches)
        stage.after_step(made.states, made.updated, engine.exact_parameters)
        losses.append(loss)
        assert stage.sharded is not None
        centres.append(torch.cat(all_gather_ragged(stage.sharded.weight_SD)))
    found = {"losses": losses, "centres": centres, "parameters": engine.full_parameters()}
    engine.close()
    return found if rank() == 0 else {}


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


@functools.cache
def dense(case: Case) -> dict[str, Any]:
    """A plain loop in one process over the whole batch, in float64."""
    first = make_stage(case).sharded
    assert first is not None
    stage = make_stage(case, sharded=False).double()
    weight = stage.image_losses.head.classifier.weight
    assert isinstance(weight, torch.nn.Parameter)
    weight.data.copy_(first.weight_SD)
    optimizer_config = OPTIMIZERS[case.optimizer]
    optimizer = build_optimizer(parameter_groups(stage.trainable(), optimizer_config), optimizer_config)
    losses, centres = [], []
    for step, factor in enumerate(FACTORS):
        optimizer.zero_grad()
        set_learning_rate(optimizer, factor)
        micro_steps = 1 if case.cached else case.micro_steps
        found = [stage(batch)["loss"] for batch in own_rows(make_batch(step), micro_steps)]
        torch.stack(found).mean().backward()
        if case.max_norm:
            # The engine's parameters by their norm, the centres by theirs.
            torch.nn.utils.clip_grad_norm_([p for p in stage.parameters() if p is not weight], case.max_norm)
            torch.nn.utils.clip_grad_norm_([weight], case.max_norm)
        optimizer.step()
        losses.append(float(torch.stack(found).mean().detach()))
        centres.append(weight.detach().clone())
    parameters = {n: x for n, x in stage.state_dict().items() if n != "image_losses.head.classifier.weight"}
    return {"losses": losses, "centres": centres, "parameters": parameters}


def assert_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float, what: str) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance), what
    for step, (ours, theirs) in enumerate(zip(found["centres"], expected["centres"], strict=True)):
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), f"{what} centres of step {step}"
    assert set(found["parameters"]) == set(expected["parameters"])
    whole = torch.stack([x.double().norm() for x in expected["parameters"].values()]).norm()
    for name, value in expected["parameters"].items():
        error = (found["parameters"][name].double() - value.double()).norm()
        assert error <= tolerance * value.double().norm() + 1e-8 * whole, f"{what} {name}: {error / value.norm():.1e}"


DENSE_CASES = [
    Case(0, max_norm=0.5, micro_steps=2, optimizer="adamw"),
    Case(2, micro_steps=2, cached=True),
    Case(3),
    Case(1, micro_steps=2),
    Case(2, text_weight=0.7),
]


@pytest.mark.parametrize(("world", "cases"), [(1, 2), (2, 5), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_at_rate_1_training_is_that_of_the_dense_classifier(world: int, cases: int, run_ranks: Callable) -> None:
    found, *_ = run_ranks(world, train_all, DENSE_CASES[:cases])
    for case, ours in zip(DENSE_CASES, found, strict=False):
        expected = dense(case)
        first = make_stage(case).sharded
        assert first is not None
        assert (expected["centres"][-1] - first.weight_SD).norm() > 0.1 * first.weight_SD.norm()  # they train
        assert_equal(ours, expected, TOLERANCE, f"{case}, {world} ranks:")


SAMPLED_CASES = [
    Case(rate=0.4, micro_steps=2, max_norm=0.5),
    Case(2, rate=0.4, micro_steps=2, cached=True, optimizer="adamw"),
    Case(rate=0.4, text_weight=0.7),
]


def test_below_rate_1_two_ranks_train_as_one(run_ranks: Callable) -> None:
    (expected,), (found, _) = run_ranks(1, train_all, SAMPLED_CASES), run_ranks(2, train_all, SAMPLED_CASES)
    for case, ours, theirs in zip(SAMPLED_CASES, found, expected, strict=True):
        assert_equal(ours, theirs, TOLERANCE, f"{case}:")


def test_in_half_precision_the_centres_follow_those_of_fp32(run_ranks: Callable) -> None:
    (expected,) = run_ranks(1, train_all, [Case(rate=0.4)])
    for ours in run_ranks(2, train_all, [Case(2, precision=kind, rate=0.4) for kind in ("bf16", "pure_bf16")])[0]:
        assert ours["losses"] == pytest.approx(expected[0]["losses"], rel=0.02)
        for a, b in zip(ours["centres"], expected[0]["centres"], strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 0.03 * b.norm()


def test_the_engine_neither_sees_nor_exports_the_centres() -> None:
    stage: Stage = make_stage(Case())
    assert [name for name, _ in stage.named_parameters() if "classifier" in name] == []
    assert [name for name in stage.state_dict() if name.startswith("image_losses")] == [
        "image_losses.head.neck.weight",
        "image_losses.head.neck.running_mean",
        "image_losses.head.neck.running_var",
    ]
    assert stage.bytes_beside(4) == pytest.approx(IDENTITIES * stage.encoder.features * 3 * 4 / 4, rel=0.1)
