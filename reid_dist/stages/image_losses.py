"""The losses between images of identities.

Shape suffixes: B rows, D features.
"""

import torch
from torch import Tensor, nn

from reid_dist.config import I2ILoss
from reid_dist.losses.prototype import all_identities_contrast
from reid_dist.losses.triplet import batch_hard_triplet_loss
from reid_dist.models.heads import IdentityClassifier
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.identity_prompt import identity_text
from reid_dist.stages.sharded_identity import ShardedIdentityHead, head_loss, sharded_classifier


class ImageLosses(nn.Module):
    """L = w_id L_id + w_tri L_tri (Luo et al. 2019) + w_text L_i2tce (CLIP-ReID, Li, Sun & Li, AAAI 2023).

    All see the embedding that retrieval uses; the identity loss sees it through the BNNeck. L_i2tce compares it with
    the sentences of all identities, which an identity prompt stage has learned.
    """

    def __init__(self, setting: I2ILoss, features: int, run: Surroundings) -> None:
        super().__init__()
        self.setting = setting
        self.sharded = sharded_classifier(features, setting.sampling_rate, run) if setting.sharded_classifier else None
        self.head: nn.Module = (
            IdentityClassifier(features, run.identities)
            if self.sharded is None
            else ShardedIdentityHead(features, self.sharded)
        )
        self.text = identity_text(run) if setting.identity_text_weight else None

    def forward(self, image_BD: Tensor, pid_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the rows, and its parts before they are weighted."""
        setting = self.setting
        parts = {
            "identity": head_loss(self.head, image_BD, pid_B, setting.label_smoothing),
            "triplet": batch_hard_triplet_loss(image_BD, pid_B, setting.triplet_margin),
        }
        if self.text is not None:
            text_CD, log_scale = self.text
            parts["identity_text"] = all_identities_contrast(
                image_BD, text_CD, pid_B, log_scale, setting.label_smoothing
            )
        weighted = [getattr(setting, f"{name}_weight") * part for name, part in parts.items()]
        return torch.stack(weighted).sum(), parts
