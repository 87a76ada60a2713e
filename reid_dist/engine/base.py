"""What the trainer needs of a backend."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from reid_dist.config import EngineConfig
from reid_dist.pieces import Piece, Saved
from reid_dist.stages import Batch, Stage, StageOutput

T = TypeVar("T")


class Engine(ABC):
    """One training stage; a new engine for each.

    Attributes:
        stage: what trains.
        config: engine settings.
    """

    stage: Stage
    config: EngineConfig

    def __call__(self, batch: Batch) -> StageOutput:
        """Forward of a micro-batch."""
        output: StageOutput = self.run(self.stage.forward, batch)
        return output

    @abstractmethod
    def run(self, part: Callable[[Batch], T], batch: Batch) -> T:
        """`part(batch)` as a forward: under the engine's autocast and hooks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward of a micro-batch; gradients are averaged over ranks and accumulation steps."""

    @abstractmethod
    def pending_norm(self) -> Tensor:
        """Global L2 norm, before clipping, of the gradients that the next `step` would use. Shape: ().

        Only between the last backward of an optimizer step and `step`; nan or inf where a gradient is. Collective, the
        same on every rank; on the device, without waiting for it.
        """

    @abstractmethod
    def step(self, skip: bool = False) -> bool:
        """Counts a micro-batch; True when it completed an optimizer step that was applied.

        Args:
            skip: lets go of the gradients where a step would be made, and changes nothing; the same on all ranks.
        """

    @abstractmethod
    def set_learning_rate(self, factor: float) -> None:
        """Sets every group to `factor` times its base learning rate."""

    @property
    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups: `names`, `lr` as it is now, `base_lr` and `weight_decay`."""

    @property
    def described(self) -> str:
        """How it trains, in a few words."""
        return f"ZeRO {self.config.zero_stage}, {self.config.precision}"

    @property
    def waits_in_forward(self) -> bool:
        """Whether a forward waits for other ranks, because weights are gathered in it."""
        return self.config.zero_stage == 3

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first group."""
        return float(self.groups[0]["lr"])

    @abstractmethod
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradients before clipping (0 before the first); waits for the device."""

    @abstractmethod
    def exact_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """fp32 parameters, then buffers, one by one on this process's device, whole on every rank.

        What is whole here already comes without a copy: read it before the next, change nothing. Collective where
        weights are sharded: all ranks ask for the same names and take all of them.

        Args:
            names: those wanted, in any order; all when None.

        Raises:
            ValueError: names that the stage does not have.
        """

    def full_parameters(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """As `exact_parameters`, which see, all at once in copies on the CPU. Collective."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.exact_parameters(names)}

    @contextlib.contextmanager
    def callable_modules(self) -> Iterator[None]:
        """Within it modules of the stage may be called by themselves, outside a forward of the engine. Collective."""
        yield

    @abstractmethod
    def full_gradients(self) -> dict[str, Tensor]:
        """fp32 averaged gradients on the CPU, whole on every rank; between the last backward and `step`. Collective."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """This rank's share of weights, frozen weights and the optimizer's state; between optimizer steps.

        All pieces stay as they are until the next `step`: they are copied beside the forward and backward before it.
        Parts: `weights` (fp32, what the optimizer moves), `frozen` (fp32), one for each tensor of the optimizer's state
        under torch's name (`exp_avg`, `exp_avg_sq`, `momentum_buffer`) and `step`, its count for each parameter. Names
        are the stage's. Buffers are the ranks' own, and not here.
        """

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Takes up what `pieces` gave, on any number of ranks; every rank calls it, before its first step.

        Afterwards all that is derived (rounded copies, whole weights, what other ranks hold of them) is as after the
        step that was saved, and the next step is the one that would have followed, bit by bit on as many ranks.

        Raises:
            UserError: a tensor of the stage was not saved, or has another size.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of hooks and buffers, so that the next stage can build its own engine."""


@torch.no_grad()
def stored_buffers(stage: Stage) -> dict[str, Tensor]:
    """The buffers of a stage that belong to its state, by name; the ranks' own may differ (BatchNorm's statistics)."""
    stored = stage.state_dict().keys()
    return {name: buffer for name, buffer in stage.named_buffers() if name in stored}
