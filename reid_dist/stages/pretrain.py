"""Generic image-text pretraining: a contrastive loss on pairs without identities."""

from collections.abc import Iterable

from reid_dist.config import PretrainLoss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import ALONE, Placement
from reid_dist.stages.contrastive import ContrastiveStage

PLAIN = PretrainLoss()


class PretrainStage(ContrastiveStage):
    """Each image against the captions and the reverse; the own pair is the only positive.

    Within the global batch it is the loss of CLIP (Radford et al. 2021), against a queue that of CM-MoCo. A sample met
    again is an identity: no negative of itself.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: PretrainLoss = PLAIN,
        freeze: Iterable[str] = (),
        place: Placement = ALONE,
    ) -> None:
        super().__init__(encoder, loss, freeze, place, positives="pair", ids="sample_id_B")
