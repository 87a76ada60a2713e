"""Optimizer steps as the trainer makes them, with a log that keeps losses."""

from typing import Any

import torch
from torch import Tensor

from reid_dist.config import GuardConfig
from reid_dist.distributed import mean_over_ranks
from reid_dist.engine import Engine
from reid_dist.guard import Guard
from reid_dist.slow_ranks import OwnWork
from reid_dist.stages import Batch
from reid_dist.trainer import Made, take_step
from reid_dist.training_state import TrainingState


class Losses(list):
    """In place of a log."""

    name = "test"
    own_work = OwnWork(torch.device("cpu"), 0.0)

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.append(float(mean_over_ranks(metrics["loss"])))


def make_step(engine: Engine, step: int, micro_batches: list[Batch]) -> tuple[Made, float]:
    """The step, and the mean loss of its micro-batches."""
    log: Any = Losses()
    guard = Guard(GuardConfig(), engine, str)
    state = TrainingState(engine, None, log, guard, torch.device("cpu"), {}, 0)  # type: ignore[arg-type]
    made = take_step(state, step, micro_batches, lambda: None)
    return made, sum(log) / len(log)
