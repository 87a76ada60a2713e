"""Text-to-image stage: a contrastive loss on the captioned images of identities."""

from collections.abc import Iterable

from reid_dist.config import T2ILoss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import ALONE, Placement
from reid_dist.stages.contrastive import ContrastiveStage


class T2IStage(ContrastiveStage):
    """Captions against images; all pairs of one identity are positives, or the own pair only.

    The vision encoder trains, or is frozen by config: then its image-to-image results stay bit for bit what they were.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: T2ILoss,
        freeze: Iterable[str] = (),
        place: Placement = ALONE,
    ) -> None:
        super().__init__(encoder, loss, freeze, place, positives=loss.positives, ids="pid_B")
