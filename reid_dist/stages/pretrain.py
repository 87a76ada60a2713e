"""Generic image-text pretraining: a contrastive loss on pairs without identities."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reid_dist.config import PretrainLoss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.losses.sigmoid import sigmoid_loss
from reid_dist.models.architecture import set_patch_dropout
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import ALONE, Batch, Features, State, Surroundings
from reid_dist.stages.momentum_contrast import MomentumContrast
from reid_dist.stages.text_losses import encode_pairs, fix_temperature

_BIAS = "sigmoid_bias"
_FIRST_SCALE, _FIRST_BIAS = 10.0, -10.0  # SigLIP's start: nearly all pairs of a batch do not match


class PretrainStage(Stage):
    """Each image against the captions and the reverse; the own pair is the only positive.

    Within the global batch it is the loss of CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023), against a queue
    that of CM-MoCo. To SigLIP's loss and to the queue a sample met again is no negative of itself. SigLIP's begins with
    a bias of -10, or what a stage before left, and where weights are random with a scale of 10.

    Args:
        encoder: see `Stage`.
        loss: settings.
        freeze: see `Stage`.
        run: the run that the stage is of.
        train_prompts: see `Stage`.
        patch_dropout: share of an image's patches that a step leaves out (Li et al. 2023, FLIP).
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: PretrainLoss,
        freeze: Iterable[str] = (),
        run: Surroundings = ALONE,
        train_prompts: bool = False,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__(encoder, freeze, train_prompts)
        self.setting = loss
        fix_temperature(encoder, loss)
        if patch_dropout:
            set_patch_dropout(encoder.visual, patch_dropout)
        if loss.objective == "sigmoid":
            if loss.temperature is None:
                encoder.replace_first_scale(_FIRST_SCALE)
            self.bias = nn.Parameter(run.handed.get(_BIAS, torch.full((1,), _FIRST_BIAS)).clone())
        if loss.queue_size:
            self.moco = MomentumContrast(encoder, self.frozen, loss, run, "pair", "sample_id_B")

    def handover(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sigmoid loss's bias, which the next stage of this kind goes on with."""
        return {_BIAS: weights["bias"]} if self.setting.objective == "sigmoid" else {}

    def features(self, batch: Batch, state: State) -> Features:
        """See `Stage.features`."""
        return encode_pairs(self.encoder, self.setting, batch, state.get("known", {}))

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        image_BD, text_BD, log_scale = features["image_BD"], features["text_BD"], features["log_scale"]
        if self.moco is not None:
            loss = self.moco.loss(image_BD, text_BD, log_scale, batch, states)
        elif self.setting.objective == "sigmoid":
            loss = sigmoid_loss(image_BD, text_BD, log_scale, self.bias, batch["sample_id_B"])
        else:
            loss = contrastive_loss(image_BD, text_BD, log_scale)
        return loss, {"contrastive": loss, "logit_scale": log_scale.exp()}
