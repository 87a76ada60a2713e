"""Ways to train under ZeRO, and steps on the same rows in every world."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainLoss, TextLoss
from reid_dist.distributed import rank, sum_over_ranks, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage
from tests.engine.test_deepspeed_engine import ARCHITECTURE, make_batch

ROWS = 6  # of a micro-batch on all ranks: 1, 2 or 3 of them
OPTIMIZERS = {
    "adamw": OptimizerConfig(name="adamw", lr=1e-3),
    "adam": OptimizerConfig(name="adam", lr=1e-3, weight_decay=0.01),
    "sgd": OptimizerConfig(name="sgd", lr=0.02, momentum=0.9),
    "plain sgd": OptimizerConfig(name="sgd", lr=0.02, momentum=0.0, weight_decay=0.0),
}


@dataclass(frozen=True)
class Case:
    """One way to train; the whole product of them would take minutes."""

    zero_stage: int
    precision: str
    optimizer: str = "adamw"
    frozen: bool = False
    accumulation: int = 1
    clip: float = 0.0
    wide: bool = False  # pure_bf16's gradients are summed in fp32: by other classes of DeepSpeed


CASES = [
    Case(0, "fp32", accumulation=2, clip=0.5),
    Case(0, "bf16", "adam", frozen=True),
    Case(1, "fp32", "sgd", frozen=True),
    Case(1, "bf16", clip=0.5),
    Case(1, "pure_bf16", "adam", frozen=True, accumulation=2, clip=0.5),
    Case(2, "fp32", frozen=True, accumulation=2),
    Case(2, "bf16", "plain sgd"),
    Case(2, "pure_bf16", "sgd", clip=0.5),
    Case(3, "fp32", "sgd", frozen=True, accumulation=2, clip=0.5),
    Case(3, "bf16", frozen=True),
    Case(3, "pure_bf16", "adam", frozen=True),
    Case(1, "pure_bf16", "sgd", accumulation=2, wide=True),
]


def make_stage(seed: int, frozen: bool) -> Stage:
    torch.manual_seed(seed)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    return T2IStage(encoder, TextLoss(), ("visual",)) if frozen else PretrainStage(encoder, PretrainLoss())


def make_engine(case: Case, seed: int) -> DeepSpeedEngine:
    # Some weights of the tiny model are above it, and leave after each use.
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 300}} if case.zero_stage == 3 else {}
    if case.wide:
        raw["data_types"] = {"grad_accum_dtype": "fp32"}
    config = EngineConfig(
        zero_stage=case.zero_stage,
        precision=case.precision,
        gradient_accumulation_steps=case.accumulation,
        max_grad_norm=case.clip,
        deepspeed=raw,
    )
    return DeepSpeedEngine(make_stage(seed, case.frozen).train(), config, OPTIMIZERS[case.optimizer], ROWS)


def own_rows(seed: int) -> Batch:
    """This rank's share of a micro-batch that is the same in every world."""
    share = ROWS // world_size()
    return {name: x[rank() * share :][:share] for name, x in make_batch(ROWS, seed).items()}


def text_alone(stage: Stage, batch: Batch) -> Tensor:
    """A loss that gives the other tower, trained or not, and the temperature no gradient."""
    return stage.encoder.encode_text(batch["token_BL"]).square().mean()


def backward(engine: DeepSpeedEngine, step: int, micro: int, factor: float = 1.0) -> float:
    """Forward and backward of a micro-batch, every third of the text alone; the loss of all ranks."""
    batch = own_rows(10 * step + micro)
    part = partial(text_alone, engine.stage) if (step + micro) % 3 == 2 else None
    loss = engine(batch)["loss"] if part is None else engine.run(part, batch)
    engine.backward(loss * factor)
    return float(sum_over_ranks(loss.detach().double())) / world_size()


def train(engine: DeepSpeedEngine, *steps: int) -> list[str]:
    """Losses of all micro-batches as hex."""
    found = []
    for step in steps:
        applied = []
        for micro in range(engine.config.gradient_accumulation_steps):
            found.append(backward(engine, step, micro).hex())
            applied.append(engine.step())
        assert applied == [False] * (len(applied) - 1) + [True]
    return found
