"""What a training stage is: model + losses as one module, so that an engine and the trainer see only `stage(batch)`."""

from collections.abc import Iterable
from typing import TypedDict

from torch import Tensor, nn

from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.optim import TrainableGroup

Batch = dict[str, Tensor]


class StageOutput(TypedDict):
    """What one forward gives: the loss to differentiate, parts of it to log, and what `after_step` needs."""

    loss: Tensor
    metrics: dict[str, Tensor]
    state: dict[str, Tensor]


class Stage(nn.Module):
    """Base of the stages; `encoder` is the only part that outlives a stage.

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

    def forward(self, batch: Batch) -> StageOutput:
        """Loss and metrics of a micro-batch, without side effects.

        Args:
            batch: image_BCHW uint8, token_BL, pid_B, camid_B, sample_id_B.
        """
        raise NotImplementedError

    def after_step(self, output: StageOutput, updated: bool) -> None:
        """Side effects of an optimizer step (none here); `updated` is False when the engine skipped it."""

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
