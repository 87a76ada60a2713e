"""The loop of one stage."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch

from reid_dist.config import OptimizerConfig
from reid_dist.data.bad_samples import BadSamples
from reid_dist.engine import Engine
from reid_dist.metrics import StageLog
from reid_dist.optim import lr_factor
from reid_dist.stages import Batch
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.contract import State

INPUTS = ("image_BCHW", "token_BL", "masked_token_BL")  # of a batch: what encoders take, and losses do not need


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
    stage = engine.stage.train()
    stage.start(engine.exact_parameters)
    run_step = cached_step if engine.config.cached_gradients else accumulated_step
    for step, micro_batches in enumerate(loader.steps(0, total_steps)):
        factor = lr_factor(optimizer, step, total_steps)
        engine.set_learning_rate(factor)
        stage.set_learning_rate(factor)
        states, updated = run_step(engine, stage.prepare(micro_batches), device, log)
        stage.after_step(states, updated, engine.exact_parameters)
        log.step_done(step, engine.learning_rate, engine.gradient_norm, loader.wait_seconds, loader.bad_samples.count)


def accumulated_step(
    engine: Engine, micro_batches: list[Batch], device: torch.device, log: StageLog
) -> tuple[list[State], bool]:
    """One optimizer step, each micro-batch with a loss of its own.

    Returns:
        The states of the micro-batches, and whether the step was applied.
    """
    states, updated = [], False
    for batch in micro_batches:
        output = engine(_on(device, batch))
        engine.backward(output["loss"])
        updated = engine.step()
        log.add({"loss": output["loss"], **output["metrics"]})
        states.append(output["state"])
    return states, updated


def cached_step(
    engine: Engine, micro_batches: list[Batch], device: torch.device, log: StageLog
) -> tuple[list[State], bool]:
    """One optimizer step with the loss of all its micro-batches together; images go to the device twice.

    Returns:
        The states of the micro-batches, and whether the step was applied.
    """
    stage, updated = engine.stage, False
    passes = [engine.run(partial(first_pass, stage), _on(device, batch)) for batch in micro_batches]
    known = [_on(device, {name: x for name, x in batch.items() if name not in INPUTS}) for batch in micro_batches]
    cached = engine.run(lambda _: joint_gradients(stage, known, passes), {})
    for index, (batch, first) in enumerate(zip(micro_batches, passes, strict=True)):
        replay = partial(surrogate, stage, first=first, cached=cached, index=index)
        engine.backward(engine.run(replay, _on(device, batch)))
        updated = engine.step()
    log.add({"loss": cached.loss, **cached.metrics})
    return [first.state for first in passes], updated


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
