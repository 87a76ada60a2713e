"""A stage of a recipe on made-up batches, trained by plain loops: an engine alone, torch alone, torch's DDP.

Each loop makes the method's own part of a step too (queue and momentum encoders behind it), and nothing else: no
schedule, no log, no guard.
"""

import argparse
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reid_dist import distributed
from reid_dist.config import RunConfig, StageConfig
from reid_dist.engine import Engine, build_engine
from reid_dist.errors import UserError
from reid_dist.inputs import build_encoder, check_batch
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.planning.building import count_identities
from reid_dist.stages import Batch, Stage, Surroundings, build_stage
from reid_dist.stages.contract import State
from reid_dist.stages.identity_prompt import IDENTITY_TEXT
from reid_dist.stages.text_losses import IDENTITY_IMAGES


@dataclass(frozen=True)
class Trained:
    """What is trained: one stage of a recipe, on every rank alike.

    Attributes:
        config: the recipe.
        name: of the stage.
        ranks: that train it.
    """

    config: RunConfig
    name: str
    ranks: int

    @property
    def stage(self) -> StageConfig:
        """Its settings."""
        return next(stage for stage in self.config.stages if stage.name == self.name)

    @property
    def rows(self) -> int:
        """Samples of a rank and micro-batch."""
        return check_batch(self.stage, self.ranks)

    def check(self) -> None:
        """Whether the loops here can train it.

        Raises:
            UserError: they cannot.
        """
        names = [stage.name for stage in self.config.stages]
        if self.name not in names:
            raise UserError(f"--stage {self.name}: the recipe has {', '.join(names)}")
        if self.stage.engine.cached_gradients or self.stage.kind == "identity_prompt":
            raise UserError(f"--stage {self.name}: cached gradients and identity prompts are not measured here")
        if self.config.model.word_gru is not None or (self.stage.data.weights and self.stage.kind == "i2i"):
            raise UserError(
                f"--stage {self.name}: towers of words and mixes with uncaptioned sets are not measured here"
            )
        _ = self.rows

    def build(self, device: torch.device) -> Stage:
        """The stage with random weights, the same on all ranks."""
        encoder = build_encoder(self.config.model, self.config.seed)
        identities = self.stage.data.identities or count_identities(self.stage)
        features = torch.randn(identities, encoder.features)
        handed = dict.fromkeys((IDENTITY_TEXT, IDENTITY_IMAGES), features)
        precision = self.stage.engine.precision
        place = Surroundings(self.rows, device, precision, self.config.seed, identities, handed=handed)
        return build_stage(self.stage, encoder, place).train()

    def batches(self, stage: Stage, count: int) -> list[list[Batch]]:
        """Micro-batches of so many steps on the CPU, other ones on each rank; pairs of one identity."""
        generator = torch.Generator().manual_seed(distributed.rank())
        micro = self.stage.engine.gradient_accumulation_steps
        return [[self._batch(stage, generator) for _ in range(micro)] for _ in range(count)]

    def _batch(self, stage: Stage, generator: torch.Generator) -> Batch:
        rows, shape = self.rows, stage.encoder.text_shape

        def integers(high: int, *size: int) -> Tensor:
            return torch.randint(high, size, generator=generator)

        token_BL = integers(shape.vocab_size - 4, rows, shape.context_length) + 3
        token_BL[:, -1] = shape.vocab_size - 1  # where the sentence ends
        people = integers(self.stage.data.identities or count_identities(self.stage), (rows + 1) // 2)
        return {
            "image_BCHW": integers(256, rows, 3, *self.config.model.image_size).to(torch.uint8),
            "token_BL": token_BL,
            "masked_token_BL": token_BL,
            "masked_label_BL": token_BL,
            "pid_B": people.repeat_interleave(2)[:rows],
            "camid_B": integers(6, rows),
            "sample_id_B": integers(2**31, rows),
        }


def add_trained_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is trained, and where the rows go."""
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/quickstart.yaml"), help="recipe")
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="setting over the recipe's")


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuses counts below 1.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        given = getattr(options, name)
        for count in given if isinstance(given, list) else [given]:
            if count < 1:
                raise UserError(f"--{name} {count}: must be above 0")


def on_device(device: torch.device, batch: Batch) -> Batch:
    """A batch there."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class Loop(ABC):
    """Optimizer steps of a stage."""

    @abstractmethod
    def step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step."""


class EngineLoop(Loop):
    """Call, backward and step of an engine, which it does not own."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device

    def step(self, micro_batches: list[Batch]) -> None:
        """See `Loop`."""
        engine, states, updated = self._engine, list[State](), False
        for batch in engine.stage.prepare(micro_batches):
            output = engine(on_device(self._device, batch))
            engine.backward(output["loss"])
            updated = engine.step()
            states.append(output["state"])
        engine.stage.after_step(states, updated, engine.exact_parameters)


class TorchLoop(Loop):
    """Torch's optimizer on the bare stage, or behind DistributedDataParallel, which averages gradients over ranks."""

    def __init__(self, trained: Trained, device: torch.device, parallel: bool) -> None:
        self.stage = trained.build(device).to(device)
        self._device, self._engine = device, trained.stage.engine
        # As our engines: BatchNorm's statistics are each rank's own.
        self._forward: nn.Module = self.stage
        if parallel:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the argument's new name is not in torch 2.11
                self._forward = DistributedDataParallel(self.stage, broadcast_buffers=False)
        groups = parameter_groups(self.stage.trainable(), trained.stage.optimizer)
        self._optimizer = build_optimizer(groups, trained.stage.optimizer)
        self._parameters = [p for p in self.stage.parameters() if p.requires_grad]
        self.stage.start(self._weights)

    def step(self, micro_batches: list[Batch]) -> None:
        """See `Loop`."""
        states = [self._backward(batch, len(micro_batches)) for batch in self.stage.prepare(micro_batches)]
        if self._engine.max_grad_norm:
            nn.utils.clip_grad_norm_(self._parameters, self._engine.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.stage.after_step(states, True, self._weights)

    def _backward(self, batch: Batch, count: int) -> State:
        half = self._engine.precision != "fp32"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            output = self._forward(on_device(self._device, batch))
        (output["loss"] / count).backward()
        state: State = output["state"]
        return state

    def _weights(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        found = {**dict(self.stage.named_parameters()), **dict(self.stage.named_buffers())}
        yield from ((name, found[name].detach()) for name in names)


def build_of(trained: Trained, device: torch.device) -> Engine:
    """The recipe's engine with the stage in it; the same weights on all ranks."""
    stage = trained.build(device)
    return build_engine(stage, trained.stage.engine, trained.stage.optimizer, trained.rows)
