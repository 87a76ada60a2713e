"""What a training stage is: model + losses as one module, so that an engine and the trainer see only `stage(batch)`."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.optim import TrainableGroup

Batch = dict[str, Tensor]
Features = dict[str, Tensor]  # names that end in _BD hold a row for each sample, others (log_scale) one value for all
State = dict[str, Any]
Weights = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]  # full fp32 tensors of the parameters named


class StageOutput(TypedDict):
    """What one forward gives: the loss to differentiate, parts of it to log, and what `after_step` needs."""

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


@dataclass(frozen=True)
class Placement:
    """What a stage must know of the run to keep anything beside the model.

    `rows` are the samples of one rank and micro-step; `seed` is the same on all ranks.
    """

    rows: int = 0
    device: torch.device | str = "cpu"
    precision: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    seed: int = 0


ALONE = Placement()


class Stage(nn.Module):
    """Base of the stages; `encoder` is the only part that outlives a stage.

    A forward is `keys`, `features`, `loss`, in this order and without side effects; `after_step` has them, once for an
    optimizer step. The loss sees the encoder only through the features, so that these can be cached
    (`cached_gradients.py`).

    Args:
        encoder: the dual encoder, changed by training.
        freeze: names of towers (`visual`, `text`) that do not train and stay in evaluation mode.
    """

    def __init__(self, encoder: DualEncoder, freeze: Iterable[str] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        self.frozen = tuple(freeze)
        for tower in self.frozen:
            getattr(encoder, tower).requires_grad_(False)

    def prepare(self, micro_batches: list[Batch]) -> list[Batch]:
        """Adds what the micro-batches of one step must know of each other (nothing here)."""
        return micro_batches

    def keys(self, batch: Batch) -> State:
        """What a micro-batch leaves for `after_step`, made before the anchors so that its transfer runs beside them."""
        return {}

    def features(self, batch: Batch, state: State) -> Features:
        """What the loss needs of the encoder.

        Args:
            batch: image_BCHW uint8, token_BL, pid_B, camid_B, sample_id_B.
            state: what `keys` gave for it.
        """
        raise NotImplementedError

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the rows and parts of it to log; differentiable in the features and the stage's own heads.

        Args:
            features: of one micro-batch, or of several in order.
            batch: what is known of the same rows; no images or tokens.
            states: of the same micro-batches.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, part: Callable[[Batch], Any] | None = None) -> Any:
        """The `StageOutput` of a micro-batch, or `part(batch)`: to an engine every pass must be a forward."""
        if part is not None:
            return part(batch)
        state = self.keys(batch)
        loss, metrics = self.loss(self.features(batch, state), batch, [state])
        return StageOutput(loss=loss, metrics=metrics, state=state)

    def start(self, weights: Weights) -> None:
        """Called once, when the engine has made all ranks' weights equal; nothing to do here."""

    def after_step(self, states: Sequence[State], updated: bool, weights: Weights) -> None:
        """Side effects of an optimizer step (none here).

        Args:
            states: of all its micro-batches, in order.
            updated: False when the engine skipped the step: then nothing may change, on any rank.
            weights: the engine's, after the step.
        """

    def bytes_beside(self, world_size: int) -> float:
        """Bytes of one rank of `world_size` that the engine does not hold: none here."""
        return 0.0

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """The embedding that retrieval compares. Shape: (B, 3, H, W) -> (B, D)."""
        return self.encoder.encode_image(image_BCHW)

    def encode_text(self, token_BL: Tensor) -> Tensor:
        """The embedding that retrieval compares. Shape: (B, L) -> (B, D)."""
        return self.encoder.encode_text(token_BL)

    def trainable(self) -> list[TrainableGroup]:
        """The parameters that train: those of the encoder, and the new ones of this stage's heads."""
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        old = {name: p for name, p in named.items() if name.startswith("encoder.")}
        new = {name: p for name, p in named.items() if name not in old}
        return [TrainableGroup(False, old), TrainableGroup(True, new)]

    def train(self, mode: bool = True) -> "Stage":
        """Training mode for all but the frozen towers, whose normalisation and dropout must not move."""
        super().train(mode)
        for tower in self.frozen:
            getattr(self.encoder, tower).eval()
        return self
