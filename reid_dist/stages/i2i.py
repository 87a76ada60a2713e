"""Image-to-image stage: identity loss on a BNNeck, batch-hard triplet loss, optional text supervision."""

from collections.abc import Sequence

from torch import Tensor

from reid_dist.config import I2ILoss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.losses.identity import identity_loss
from reid_dist.losses.triplet import batch_hard_triplet_loss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.heads import IdentityClassifier
from reid_dist.stages.base import Batch, Features, Stage, State


class I2IStage(Stage):
    """L = w_id L_id + w_tri L_tri + w_text L_contrastive (Luo et al. 2019; the text part as in methods.md card 1).

    Both image losses see the embedding that retrieval uses; the identity loss sees it through the BNNeck. Without
    text supervision the text tower and the temperature do not train.
    """

    def __init__(
        self, encoder: DualEncoder, features: int, identities: int, loss: I2ILoss, freeze: tuple[str, ...] = ()
    ) -> None:
        with_text = loss.text_weight > 0
        super().__init__(encoder, freeze if with_text else (*freeze, "text"))
        encoder.logit_scale.requires_grad_(with_text)
        self.weights = loss
        self.head = IdentityClassifier(features, identities)

    def features(self, batch: Batch, state: State) -> Features:
        """See `Stage.features`."""
        if self.weights.text_weight == 0:
            return {"image_BD": self.encoder.encode_image(batch["image_BCHW"])}
        output = self.encoder(batch["image_BCHW"], batch["token_BL"])
        return {"image_BD": output.image_features, "text_BD": output.text_features, "log_scale": output.log_scale}

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        weights, image_BD, pid_B = self.weights, features["image_BD"], batch["pid_B"]
        identity = identity_loss(self.head(image_BD), pid_B, weights.label_smoothing)
        triplet = batch_hard_triplet_loss(image_BD, pid_B, weights.triplet_margin)
        loss = weights.identity_weight * identity + weights.triplet_weight * triplet
        metrics: dict[str, Tensor] = {"identity": identity, "triplet": triplet}
        if weights.text_weight > 0:
            text = contrastive_loss(image_BD, features["text_BD"], features["log_scale"], pid_B)
            loss = loss + weights.text_weight * text
            metrics |= {"contrastive": text, "logit_scale": features["log_scale"].exp()}
        return loss, metrics
