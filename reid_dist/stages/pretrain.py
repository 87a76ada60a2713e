"""Generic image-text pretraining: the contrastive loss of CLIP on pairs without identities."""

from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.stages.base import Batch, Stage, StageOutput


class PretrainStage(Stage):
    """Each image against the captions of the global batch and the reverse; the own pair is the only positive."""

    def forward(self, batch: Batch) -> StageOutput:
        """See `Stage.forward`."""
        output = self.encoder(batch["image_BCHW"], batch["token_BL"])
        loss = contrastive_loss(output.image_features, output.text_features, output.logit_scale)
        return {"loss": loss, "metrics": {"contrastive": loss, "logit_scale": output.logit_scale}, "state": {}}
