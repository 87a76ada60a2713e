"""Text-to-image stage: global contrastive loss in which all pairs of one identity are positives."""

import torch

from reid_dist.config import T2ILoss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import Batch, Stage, StageOutput


class T2IStage(Stage):
    """Captions against images of the global batch; the vision encoder trains, or is frozen by config.

    With a frozen vision encoder its image-to-image results stay bit for bit what they were.
    """

    def __init__(self, encoder: DualEncoder, loss: T2ILoss, freeze: tuple[str, ...] = ()) -> None:
        super().__init__(encoder, freeze)
        self.positives = loss.positives

    def forward(self, batch: Batch) -> StageOutput:
        """See `Stage.forward`."""
        output = self.encoder(batch["image_BCHW"], batch["token_BL"])
        pid_B: torch.Tensor | None = batch["pid_B"] if self.positives == "identity" else None
        loss = contrastive_loss(output.image_features, output.text_features, output.logit_scale, pid_B)
        return {"loss": loss, "metrics": {"contrastive": loss, "logit_scale": output.logit_scale}, "state": {}}
