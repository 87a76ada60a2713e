"""The loop of one stage."""

from collections.abc import Iterator
from typing import Protocol

import torch

from reid_dist.config import OptimizerConfig
from reid_dist.data.bad_samples import BadSamples
from reid_dist.engine import Engine
from reid_dist.metrics import StageLog
from reid_dist.optim import lr_factor
from reid_dist.stages import Batch


class Loader(Protocol):
    """What training needs of a data source."""

    wait_seconds: float
    bad_samples: BadSamples

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of this rank for each optimizer step."""


def train(
    engine: Engine, loader: Loader, optimizer: OptimizerConfig, total_steps: int, device: torch.device, log: StageLog
) -> None:
    """Trains a stage for `total_steps` optimizer steps; every rank calls it.

    Raises:
        UserError: bad data, or a loss that is not finite.
    """
    engine.stage.train()
    for step, micro_batches in enumerate(loader.steps(0, total_steps)):
        engine.set_learning_rate(lr_factor(optimizer, step, total_steps))
        for batch in micro_batches:
            output = engine({key: value.to(device, non_blocking=True) for key, value in batch.items()})
            engine.backward(output["loss"])
            updated = engine.step()
            log.add({"loss": output["loss"], **output["metrics"]})
        engine.stage.after_step(output, updated)
        log.step_done(step, engine.learning_rate, engine.gradient_norm, loader.wait_seconds, loader.bad_samples.count)
