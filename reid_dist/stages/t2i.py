"""Text-to-image stage: captions against the images of identities."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from reid_dist.config import TextLoss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import ALONE, Batch, Features, State, Surroundings
from reid_dist.stages.momentum_contrast import MomentumContrast
from reid_dist.stages.text_losses import IDENTITY_IMAGES, TextLosses, encode_pairs, fix_temperature


class T2IStage(Stage):
    """L = L_text (`TextLosses`).

    The vision encoder trains, or is frozen by config: then its image-to-image results stay bit for bit what they were.

    Args:
        encoder: see `Stage`.
        loss: settings.
        freeze: see `Stage`.
        run: the run that the stage is of.
        train_prompts: see `Stage`.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: TextLoss,
        freeze: Iterable[str] = (),
        run: Surroundings = ALONE,
        train_prompts: bool = False,
    ) -> None:
        super().__init__(encoder, freeze, train_prompts)
        fix_temperature(encoder, loss)
        if loss.mlm_weight:
            encoder.require_tokens("loss.mlm_weight")
        prototype_CD = run.handed.get(IDENTITY_IMAGES)
        vocabulary = encoder.text_shape.vocab_size
        self.text_losses = TextLosses(loss, encoder.features, vocabulary, run.identities, prototype_CD=prototype_CD)
        if loss.queue_size:
            self.moco = MomentumContrast(encoder, self.frozen, loss, run, loss.positives, "pid_B")

    def features(self, batch: Batch, state: State) -> Features:
        """See `Stage.features`."""
        return encode_pairs(self.encoder, self.text_losses.setting, batch, state.get("known", {}))

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        loss: tuple[Tensor, dict[str, Tensor]] = self.text_losses(features, batch, states, self.moco)
        return loss
