"""A sample that is not finite, under each kind of engine: one line names it, and the run is as if it had not come."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.config import EngineConfig, GuardConfig, ModelConfig, OptimizerConfig, TextLoss
from reid_dist.distributed import rank
from reid_dist.engine import build_engine
from reid_dist.guard import Guard
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages import Batch, T2IStage
from reid_dist.stages.contract import Surroundings
from tests.engine.test_deepspeed_engine import ARCHITECTURE
from tests.gathered_pieces import differing, gather

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ROWS, MICRO_STEPS = 3, 2
ADAMW = OptimizerConfig(name="adamw", lr=1e-3)


class Projected(T2IStage):
    """Its image features pass a BatchNorm, whose running statistics a NaN would spoil for good."""

    def __init__(self, queue: int) -> None:
        torch.manual_seed(0)
        encoder = build_dual_encoder(ModelConfig(architecture=str(ARCHITECTURE), image_size=(64, 32)))
        super().__init__(encoder, TextLoss(queue_size=queue, momentum=0.5), run=Surroundings(ROWS))
        self.neck = torch.nn.BatchNorm1d(encoder.features)
        self.neck.requires_grad_(False)

    def features(self, batch: Batch, state: dict[str, Any]) -> dict[str, Tensor]:
        found = super().features(batch, state)
        return {**found, "image_BD": self.neck(found["image_BD"])}


def random_batch(step: int, number: int) -> Batch:
    first = 1000 * step + 100 * number + 10 * rank()
    generator = torch.Generator().manual_seed(first)
    token_BL = torch.randint(3, 400, (ROWS, 40), generator=generator)
    token_BL[:, -1] = 511
    ids_B = torch.arange(first, first + ROWS)
    image_BCHW = torch.randn(ROWS, 3, 64, 32, generator=generator)
    return {"image_BCHW": image_BCHW, "token_BL": token_BL, "pid_B": ids_B, "sample_id_B": ids_B}


def _train(config: EngineConfig, queue: int, steps: list[int], poisoned: int) -> tuple[list[str], dict, dict, list]:
    """Trains steps of those numbers, one with a bad sample: row 1 of rank 1's last micro-batch."""
    stage = Projected(queue)
    engine = build_engine(stage.train(), config, ADAMW, ROWS)
    guard = Guard(GuardConfig(), engine, str)
    stage.start(engine.exact_parameters)
    lines, losses = [], []
    for step in steps:
        batches = [random_batch(step, number) for number in range(MICRO_STEPS)]
        if step == poisoned and rank() == 1:
            batches[1]["image_BCHW"][1, 0, 0, 0] = float("nan")
        guard.begin()
        states, found, verdict = [], [], None
        for number, batch in enumerate(batches):
            output = engine(batch)
            engine.backward(output["loss"])
            found.append(output["loss"].detach())
            states.append(output["state"])
            if number + 1 == MICRO_STEPS:
                verdict = guard.admit(step, found, engine.pending_norm(), iter(batches))
            updated = engine.step(verdict is not None and verdict.skip)
        assert verdict is not None and updated != verdict.skip
        stage.after_step(states, updated, engine.exact_parameters)
        lines.append(verdict.line)
        losses += [float(x).hex() for x in found] if updated else []
    whole = gather([*engine.pieces(), *stage.pieces()])
    buffers = {name: x.clone() for name, x in stage.named_buffers()}
    engine.close()
    return lines, whole, buffers, losses


def _with_and_without(config: EngineConfig, queue: int) -> tuple[list[str], list[str], bool]:
    lines, whole, buffers, losses = _train(config, queue, [0, 1, 2], poisoned=1)
    _, expected, expected_buffers, expected_losses = _train(config, queue, [0, 2], poisoned=-1)
    different = differing(whole, expected)
    different += [name for name, x in buffers.items() if not x.equal(expected_buffers[name])]
    return lines, different, losses == expected_losses


@pytest.mark.parametrize(("backend", "zero_stage"), [("deepspeed", 0), ("deepspeed", 3), ("torch", 3)])
def test_the_sample_is_named_and_nothing_of_its_step_stays(backend: str, zero_stage: int, run_ranks: Callable) -> None:
    queue = 30 if zero_stage < 3 else 0
    config = EngineConfig(
        backend=backend, zero_stage=zero_stage, gradient_accumulation_steps=MICRO_STEPS, max_grad_norm=1.0
    )
    for lines, different, same_losses in run_ranks(2, _with_and_without, config, queue):
        assert lines[0] == lines[2] == ""
        assert "the loss is nan on " in lines[1]
        assert "; features not finite: 1111 (rank 1) (1 in a row, 1 in all)" in lines[1]
        assert different == [] and same_losses
