"""The loop of one stage."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reid_dist.checkpoint.reader import Checkpoint
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.config import OptimizerConfig
from reid_dist.consistency import check_ranks_agree
from reid_dist.errors import CheckpointError, NoMemoryError, Stopped
from reid_dist.ledger import Ledger
from reid_dist.metrics import say
from reid_dist.optim import lr_factor
from reid_dist.out_of_memory import is_out_of_memory, memory_line
from reid_dist.stages import Batch
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.contract import State
from reid_dist.supervision.agreement import StopAgreement
from reid_dist.supervision.watchdog import Watchdog
from reid_dist.training_state import TrainingState

INPUTS = ("image_BCHW", "token_BL", "masked_token_BL")  # of a batch: what encoders take, and losses do not need


@dataclass(frozen=True)
class Companions:
    """What goes along with the training of a stage and changes nothing in it.

    Attributes:
        watchdog: hears at each step where this rank is.
        stop: whether the ranks were told to stop.
        compare_every: steps between comparisons of the ranks' weights; 0: none.
        ledger: None: none is kept.
        writer: of checkpoints.
        save_every: steps between two; 0: only when the ranks were told to stop.
    """

    watchdog: Watchdog
    stop: StopAgreement
    compare_every: int
    ledger: Ledger | None
    writer: CheckpointWriter
    save_every: int


def train(
    state: TrainingState,
    optimizer: OptimizerConfig,
    total_steps: int,
    companions: Companions,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Trains a stage to `total_steps`, from its beginning or from a checkpoint; every rank calls it.

    Raises:
        UserError: bad data.
        NonFiniteError: too many steps in a row whose loss or gradient is not finite.
        DivergenceError: the ranks hold different weights.
        CheckpointError: a checkpoint could not be written.
        Stopped: the ranks were told to stop, and have saved.
    """
    state.engine.stage.train()
    state.engine.stage.start(state.engine.exact_parameters)
    start = 0 if checkpoint is None else checkpoint.manifest.step
    if checkpoint is not None:
        state.restore(checkpoint)
    done = start
    state.log.own_work.start()
    try:
        for step in _steps(state, optimizer, total_steps, companions, start):
            keep(state, companions, step + 1, total_steps)
            companions.watchdog.at("data", step + 1)
            state.log.own_work.start()
            done = step + 1
    except Exception as error:
        if is_out_of_memory(error):
            raise NoMemoryError(memory_line(error, done)) from error
        raise
    companions.writer.check_same()
    try:
        companions.writer.finish()
    except CheckpointError as error:  # the stage is trained, and its export is what counts now
        say(str(error))


def _steps(
    state: TrainingState, optimizer: OptimizerConfig, total_steps: int, companions: Companions, start: int
) -> Iterator[int]:
    """Makes the optimizer steps; each is given when all but keeping it is done."""
    engine, loader, stage = state.engine, state.loader, state.engine.stage
    for step, micro_batches in enumerate(loader.steps(start, total_steps), start):
        companions.watchdog.at("step", step)
        factor = lr_factor(optimizer, step, total_steps)
        engine.set_learning_rate(factor)
        stage.set_learning_rate(factor)
        made = take_step(state, step, stage.prepare(micro_batches), companions.writer.wait_for_copy)
        stage.after_step(made.states, made.updated, engine.exact_parameters)
        if companions.ledger is not None:
            companions.ledger.add(step, micro_batches, made.losses, made.updated)
        if companions.compare_every and (step + 1) % companions.compare_every == 0:
            check_ranks_agree(stage, step)
        bad, skipped = loader.bad_samples.count, state.guard.skipped
        state.log.step_done(step, engine.learning_rate, engine.gradient_norm, loader.wait_seconds, bad, skipped)
        yield step


def keep(state: TrainingState, companions: Companions, done: int, total_steps: int) -> None:
    """Saves after so many steps, where it is time or the ranks were told to stop.

    Raises:
        CheckpointError: the checkpoint, or the one before it, could not be written.
        Stopped: the ranks were told to stop, and have saved.
    """
    signal, every = companions.stop.poll(), companions.save_every
    ends = done == total_steps
    if not (ends or signal or (every and done % every == 0)):
        return
    if companions.compare_every and done % companions.compare_every:  # so that nothing written mixes two models
        check_ranks_agree(state.engine.stage, done - 1)
    if ends:
        return  # what is written then is the export
    companions.watchdog.at("save", done)
    engine = state.engine
    companions.writer.save(
        done, engine.stage.pieces(), state.private(), state.record(done), wait=bool(signal), unchanging=engine.pieces()
    )
    if signal:
        raise Stopped(f"{signal}: saved after step {done}; start again to go on")


@dataclass(frozen=True)
class Made:
    """An optimizer step that was made: the micro-batches' states and losses, and whether the step was applied."""

    states: list[State]
    losses: list[Tensor]
    updated: bool


def take_step(state: TrainingState, step: int, micro_batches: list[Batch], before_update: Callable[[], None]) -> Made:
    """One optimizer step, or where a loss or a gradient is not what it should be none: then nothing changes.

    Until `before_update` is called, between the last backward and the optimizer, weights and moments stay as they are.
    """
    state.guard.begin()
    make = cached_step if state.engine.config.cached_gradients else accumulated_step
    return make(state, step, micro_batches, before_update)


def accumulated_step(
    state: TrainingState, step: int, micro_batches: list[Batch], before_update: Callable[[], None]
) -> Made:
    """One optimizer step, each micro-batch with a loss of its own."""
    engine, made, logged, updated = state.engine, list[State](), list[dict[str, Tensor]](), False
    for number, batch in enumerate(micro_batches, 1):
        if engine.waits_in_forward:
            state.log.own_work.reached()
        output = engine(_on(state.device, batch))
        state.log.own_work.reached()
        engine.backward(output["loss"])
        made.append(output["state"])
        logged.append({name: x.detach() for name, x in {"loss": output["loss"], **output["metrics"]}.items()})
        skip = number == len(micro_batches) and not _admitted(state, step, micro_batches, logged)
        before_update()
        updated = engine.step(skip)
    return Made(made, [values["loss"] for values in logged], updated)


def cached_step(state: TrainingState, step: int, micro_batches: list[Batch], before_update: Callable[[], None]) -> Made:
    """One optimizer step with the loss of all its micro-batches together; images go to the device twice."""
    engine, stage, device, updated = state.engine, state.engine.stage, state.device, False
    passes = [engine.run(partial(first_pass, stage), _on(device, batch)) for batch in micro_batches]
    known = [_on(device, {name: x for name, x in batch.items() if name not in INPUTS}) for batch in micro_batches]
    cached = engine.run(lambda _: joint_gradients(stage, known, passes), {})
    logged = [{"loss": cached.loss.detach(), **cached.metrics}]
    for index, (batch, first) in enumerate(zip(micro_batches, passes, strict=True)):
        state.log.own_work.reached()
        replay = partial(surrogate, stage, first=first, cached=cached, index=index)
        engine.backward(engine.run(replay, _on(device, batch)))
        skip = index + 1 == len(micro_batches) and not _admitted(state, step, micro_batches, logged)
        before_update()
        updated = engine.step(skip)
    return Made([first.state for first in passes], [logged[0]["loss"]], updated)


def _admitted(state: TrainingState, step: int, micro_batches: list[Batch], logged: list[dict[str, Tensor]]) -> bool:
    """Whether the gradients that lie there may move weights; of such a step the values are logged."""
    losses = [values["loss"] for values in logged]
    again = (_on(state.device, batch) for batch in micro_batches)
    verdict = state.guard.admit(step, losses, state.engine.pending_norm(), again)
    if verdict.skip:
        say(f"{state.log.name}: {verdict.line}")
    else:
        for values in logged:
            state.log.add(values)
    return not verdict.skip


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
