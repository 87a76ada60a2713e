"""Stages with a queue, and accumulation that caches gradients: N ranks x A micro-steps equal one plain process.

For each case the loss of every step, the gradients of the last, and after 3 SGD steps the parameters, the momentum
encoders and the queue slot by slot agree with one process on the concatenated batch, within 1e-5 relative norm.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from reid_dist.config import EngineConfig, I2ILoss, ModelConfig, OptimizerConfig, PretrainLoss, TextLoss
from reid_dist.distributed import rank, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch, Surroundings, Weights
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage
from tests.distributed.steps import make_step

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "row_conv_tiny.json")
GLOBAL_BATCH = 16
IDENTITIES = 24
STEPS = 3
SGD = OptimizerConfig(name="sgd", lr=0.02, momentum=0.9, weight_decay=0.01, new_lr_multiplier=3.0)
TOLERANCE = 1e-5
# 40 slots: wrapped in the third step, and no multiple of anything. Momentum 0.5: a key encoder that moves.
QUEUE = {"queue_size": 40, "momentum": 0.5}
PUBLISHED = TextLoss(positives="pair", queue_mask="batch", temperature=0.07, **QUEUE)
LOSSES = {
    "t2i": TextLoss(),
    "t2i_published": PUBLISHED,
    "t2i_queue": TextLoss(key_head="live", **QUEUE),
    "t2i_in_batch": TextLoss(in_batch_negatives=True, **QUEUE),
    "t2i_batch_mask": TextLoss(queue_mask="batch", queue_sharded=True, **QUEUE),
    "t2i_sharded": TextLoss(in_batch_negatives=True, queue_sharded=True, **QUEUE),
    "t2i_frozen": TextLoss(in_batch_negatives=True, **QUEUE),
    "pretrain": PretrainLoss(),
    "pretrain_queue": PretrainLoss(**QUEUE),
    "pretrain_in_batch": PretrainLoss(in_batch_negatives=True, **QUEUE),
}


class Case(NamedTuple):
    """A stage under an engine; `micro_steps` with `cached` have the loss of the whole step."""

    name: str
    zero_stage: int = 1
    micro_steps: int = 1
    cached: bool = False
    precision: Literal["fp32", "bf16", "pure_bf16"] = "fp32"


def make_stage(name: str, rows: int, precision: Literal["fp32", "bf16", "pure_bf16"] = "fp32") -> Stage:
    torch.manual_seed(1)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    place = Surroundings(rows, precision=precision)
    if name.startswith("i2i"):
        return I2IStage(encoder, I2ILoss(text_weight=0.5), run=Surroundings(identities=IDENTITIES))
    freeze = ("visual",) if name == "t2i_frozen" else ()
    loss = LOSSES[name]
    return (
        T2IStage(encoder, loss, freeze, place)
        if isinstance(loss, TextLoss)
        else PretrainStage(encoder, loss, freeze, place)
    )


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    token = torch.randint(3, 400, (GLOBAL_BATCH, 40), generator=generator)
    token[:, 20:] = 0
    token[torch.arange(GLOBAL_BATCH), torch.randint(5, 39, (GLOBAL_BATCH,), generator=generator)] = 511
    return {
        "image_BCHW": torch.randint(0, 256, (GLOBAL_BATCH, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.randint(0, IDENTITIES, (GLOBAL_BATCH,), generator=generator),
        # In tars: number x 2^32 + place. A third of the samples of a step comes again in the next.
        "sample_id_B": ((torch.arange(GLOBAL_BATCH) + step * 10) << 32) + 7,
    }


def own_rows(batch: Batch, micro_steps: int) -> list[Batch]:
    """The plan's order: micro-batch after micro-batch, in each of them rank after rank."""
    rows = GLOBAL_BATCH // micro_steps // world_size()
    starts = [(micro_step * world_size() + rank()) * rows for micro_step in range(micro_steps)]
    return [{name: x[start : start + rows] for name, x in batch.items()} for start in starts]


def kept_beside(stage: Stage) -> dict[str, Any]:
    """Queue and momentum encoders; a queue's shard by its number."""
    if not isinstance(stage, Stage) or stage.moco is None:
        return {}
    ring = stage.moco.queue.ring
    slots = slice(0, ring.slots)
    return {
        "momentum": {name: x.clone() for name, x in stage.moco.key_encoder.state().items()},
        "keys": {"image": ring.image_XD[slots].clone(), "text": ring.text_XD[slots].clone()},
        "labels": torch.stack([ring.ids_X[slots].long(), ring.sequence_X[slots]]),
        "digest": int(stage.moco.queue.digest()),
    }


def reference(name: str) -> dict[str, Any]:
    """A plain torch loop in one process: no engine, no process group, the whole batch."""
    stage = make_stage(name, GLOBAL_BATCH).train()
    weights: Weights = lambda names: [(n, x.detach()) for n, x in stage.state_dict().items() if n in names]  # noqa: E731
    optimizer = build_optimizer(parameter_groups(stage.trainable(), SGD), SGD)
    stage.start(weights)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        output = stage(make_batch(step))
        output["loss"].backward()
        gradients = {n: p.grad.clone() for n, p in stage.named_parameters() if p.requires_grad}
        optimizer.step()
        stage.after_step([output["state"]], True, weights)
        losses.append(output["loss"].item())
    return {"losses": losses, "gradients": gradients, "parameters": dict(stage.state_dict()), **kept_beside(stage)}


class RecordingEngine(DeepSpeedEngine):
    """Keeps the gradients that the last optimizer step takes."""

    gradients: dict[str, Tensor]
    micro_steps = 0

    def step(self, skip: bool = False) -> bool:
        self.micro_steps += 1
        if self.micro_steps == STEPS * self.config.gradient_accumulation_steps:
            self.gradients = self.full_gradients()
        return super().step(skip)


def train(case: Case) -> dict[str, Any]:
    rows = GLOBAL_BATCH // world_size() // case.micro_steps
    stage = make_stage(case.name, rows, case.precision).train()
    config = EngineConfig(
        zero_stage=case.zero_stage,
        precision=case.precision,
        gradient_accumulation_steps=case.micro_steps,
        cached_gradients=case.cached,
    )
    engine = RecordingEngine(stage, config, SGD, rows)
    stage.start(engine.exact_parameters)
    losses = []
    for step in range(STEPS):
        made, loss = make_step(engine, step, stage.prepare(own_rows(make_batch(step), case.micro_steps)))
        assert made.updated and len(made.states) == case.micro_steps
        stage.after_step(made.states, made.updated, engine.exact_parameters)
        losses.append(loss)
    found = {"losses": losses, **kept_beside(stage)}
    parameters = engine.full_parameters()
    if rank() == 0:
        found |= {"gradients": engine.gradients, "parameters": parameters}
    engine.close()
    return found


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert set(ours) == set(theirs), what
    whole = float(torch.stack([value.double().norm() for value in theirs.values()]).norm())
    for name, value in theirs.items():
        error = (ours[name].double() - value.double()).norm()
        # What is zero in theory, such as the gradient of a bias before a normalisation, holds rounding on both sides.
        assert error <= TOLERANCE * value.double().norm() + 1e-8 * whole, f"{what} {name}: {error / value.norm():.2e}"


def assert_equal_to_one_process(case: Case, results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    what = f"{case}, {len(results)} ranks:"
    assert expected["losses"][-1] > 0.1, f"{what} nothing is learned from a loss of zero"
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE, abs=1e-7), what
    assert_close(results[0]["gradients"], expected["gradients"], f"{what} gradient of")
    assert_close(results[0]["parameters"], expected["parameters"], f"{what} value of")
    if "keys" not in expected:
        return
    sharded = LOSSES[case.name].queue_sharded
    for index, result in enumerate(results):
        own = slice(index, None, len(results)) if sharded else slice(None)
        assert_close(result["momentum"], expected["momentum"], f"{what} momentum of")
        assert_close(result["keys"], {name: x[own] for name, x in expected["keys"].items()}, f"{what} keys of")
        assert result["labels"].equal(expected["labels"][:, own]), what
        assert result["digest"] == results[0]["digest"], f"{what} rank {index} holds another queue"


# Every loss on 2 ranks; the published one and cached gradients under every ZeRO stage and rank count.
CASES = {
    1: [
        *(Case(name, zero) for zero, name in enumerate(("t2i_published", "t2i_in_batch", "pretrain_queue"))),
        Case("t2i_published", 1, 4),
        Case("t2i_queue", 2, 4),
        Case("t2i_in_batch", 1, 4, cached=True),
        Case("t2i", 0, 2, cached=True),
        Case("i2i", 1, 2, cached=True),
        Case("pretrain", 2, 4, cached=True),
    ],
    2: [
        *(Case(name, index % 3) for index, name in enumerate(n for n in LOSSES if n not in ("t2i", "pretrain"))),
        *(Case("t2i_published", zero, 2) for zero in (0, 1, 2)),
        *(Case("t2i_in_batch", zero, 2, cached=True) for zero in (0, 1, 2)),
        Case("t2i_sharded", 1, 2, cached=True),
        Case("t2i_frozen", 2, 2, cached=True),
        Case("i2i", 0, 2, cached=True),
        Case("i2i", 2, 2, cached=True),
    ],
    4: [
        Case("t2i_published", 2),
        Case("t2i_sharded", 0),
        Case("t2i_queue", 1, 2),
        Case("pretrain_in_batch", 1),
        Case("t2i", 1, 2, cached=True),
    ],
}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    return {name: reference(name) for name in {case.name for cases in CASES.values() for case in cases}}


@pytest.mark.parametrize("world", CASES)
def test_ranks_and_micro_steps_equal_a_single_process(world: int, expected: dict, run_ranks) -> None:
    by_rank = run_ranks(world, train_all, CASES[world])
    for case, *results in zip(CASES[world], *by_rank, strict=True):
        assert_equal_to_one_process(case, results, expected[case.name])


LOW_PRECISION = [
    Case("t2i_in_batch", 0, precision="bf16"),
    Case("t2i_in_batch", 1, 2, cached=True, precision="bf16"),
    Case("t2i_in_batch", 2, precision="pure_bf16"),
    Case("t2i_in_batch", 1, 2, cached=True, precision="pure_bf16"),
    Case("i2i", 1, 2, cached=True, precision="pure_bf16"),
    Case("t2i_published", 2, 2, precision="pure_bf16"),
]


def test_low_precision_rounds_and_does_no_more(expected: dict, run_ranks) -> None:
    """Keys stored in bf16, towers under autocast or in bf16 weights; the losses stay those of fp32 within 1 %."""
    for case, result in zip(LOW_PRECISION, run_ranks(2, train_all, LOW_PRECISION)[0], strict=True):
        assert result["losses"] == pytest.approx(expected[case.name]["losses"], rel=1e-2, abs=1e-6), case
        for name, average in result.get("momentum", {}).items():
            error = (average - expected[case.name]["momentum"][name]).norm()
            assert error < 0.05 * average.norm() + 1e-3, f"{case} {name}"
