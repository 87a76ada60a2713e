"""Image-text contrast, the base of pretrain and t2i."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from reid_dist.config import ContrastiveLoss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import ALONE, Batch, Features, Placement, Stage, State, Weights
from reid_dist.stages.momentum_contrast import MomentumContrast


class ContrastiveStage(Stage):
    """Each image against texts and the reverse, in the global batch or against a queue.

    `queue_size: 0`: the features of the global batch, both sides trained (`contrastive_loss`). Else momentum keys
    (`MomentumContrast`), which lets a small batch see many negatives.

    Args:
        encoder: see `Stage`.
        loss: settings.
        freeze: see `Stage`.
        place: where the queue lives.
        positives: all pairs of one identity, or the own pair only.
        ids: the batch's entry that holds identities.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: ContrastiveLoss,
        freeze: Iterable[str] = (),
        place: Placement = ALONE,
        positives: Literal["identity", "pair"] = "pair",
        ids: str = "sample_id_B",
    ) -> None:
        super().__init__(encoder, freeze)
        self.positives, self.ids, self.temperature = positives, ids, loss.temperature
        if self.temperature is not None:
            encoder.logit_scale.requires_grad_(False).fill_(-math.log(self.temperature))
        self.moco: MomentumContrast | None = None
        if loss.queue_size:
            self.moco = MomentumContrast(encoder, self.frozen, loss, place, positives, ids)

    def prepare(self, micro_batches: list[Batch]) -> list[Batch]:
        """See `Stage.prepare`."""
        return micro_batches if self.moco is None else self.moco.with_step_ids(micro_batches)

    def keys(self, batch: Batch) -> State:
        """See `Stage.keys`."""
        return {} if self.moco is None else self.moco.keys(batch)

    def features(self, batch: Batch, state: State) -> Features:
        """See `Stage.features`."""
        output = self.encoder(batch["image_BCHW"], batch["token_BL"], **state.get("known", {}))
        log_scale = output.log_scale
        if self.temperature is not None:  # exactly: the parameter may be a bf16 copy
            log_scale = torch.full_like(log_scale, -math.log(self.temperature))
        return {"image_BD": output.image_features, "text_BD": output.text_features, "log_scale": log_scale}

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        image_BD, text_BD, log_scale = features["image_BD"], features["text_BD"], features["log_scale"]
        if self.moco is not None:
            loss = self.moco.loss(image_BD, text_BD, log_scale, batch, states)
        else:
            ids_B = batch[self.ids] if self.positives == "identity" else None
            loss = contrastive_loss(image_BD, text_BD, log_scale, ids_B)
        return loss, {"contrastive": loss, "logit_scale": log_scale.exp()}

    def start(self, weights: Weights) -> None:
        """See `Stage.start`."""
        if self.moco is not None:
            self.moco.start(weights)

    def after_step(self, states: Sequence[State], updated: bool, weights: Weights) -> None:
        """See `Stage.after_step`."""
        if self.moco is not None and updated:
            self.moco.after_step(states, weights)

    def bytes_beside(self, world_size: int) -> float:
        """See `Stage.bytes_beside`."""
        return 0.0 if self.moco is None else self.moco.bytes_beside(world_size)
