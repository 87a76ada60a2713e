"""The losses between images and captions, as the stages with captions share them.

Shape suffixes: B rows, D features, L tokens, N image tokens, V vocabulary, C identities.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reid_dist.config import ContrastiveLoss, TextLoss
from reid_dist.losses.alignment import alignment_loss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.losses.mlm import masked_language_loss
from reid_dist.losses.prototype import all_identities_contrast
from reid_dist.losses.sdm import sdm_loss
from reid_dist.models.cross_modal import CrossModalEncoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.heads import IdentityClassifier, LinearClassifier, NormalizedClassifier
from reid_dist.stages.contract import Batch, Features, State
from reid_dist.stages.momentum_contrast import MomentumContrast
from reid_dist.stages.sharded_identity import head_loss

IDENTITY_IMAGES = "identity_image_CD"  # what a stage is handed for `classifier: prototypes`
CLASSIFIERS = {"linear": LinearClassifier, "normalised": NormalizedClassifier, "neck": IdentityClassifier}


class TextLosses(nn.Module):
    """L = sum of weight x loss over: contrastive, SDM, alignment, identity of both modalities, masked words.

    IRRA (methods.md card A) is SDM + identity + masked words; TextReID (card 3) is CM-MoCo + 2 x identity + alignment.

    Args:
        setting: the weights and what belongs to them.
        features: D.
        vocab_size: V.
        identities: C.
        shared: classifier of the images' identities, used for both modalities where the setting says so.
        prototype_CD: mean image feature of each identity, of unit length, used where the setting says so.
    """

    prototype_CD: Tensor

    def __init__(
        self,
        setting: TextLoss,
        features: int,
        vocab_size: int,
        identities: int,
        shared: nn.Module | None = None,
        prototype_CD: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.setting = setting
        self.classifier: nn.Module | None = None
        self.cross_modal: CrossModalEncoder | None = None
        # In a list, so that the parameters of another's module do not count as this one's.
        self._shared = [] if shared is None else [shared]
        if setting.with_prototypes:
            if prototype_CD is None:
                raise ValueError("classifier: prototypes without prototypes; hand them over")
            self.register_buffer("prototype_CD", prototype_CD, persistent=False)
        elif setting.identity_weight and setting.classifier != "shared":
            self.classifier = CLASSIFIERS[setting.classifier](features, identities)
        if setting.mlm_weight:
            self.cross_modal = CrossModalEncoder(features, setting.mlm_depth, vocab_size)

    def forward(
        self, features: Features, batch: Batch, states: Sequence[State], moco: MomentumContrast | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of captioned rows, and its parts before they are weighted.

        Args:
            features: as `encode_pairs` gives them.
            batch: pid_B, and masked_label_BL where words are hidden.
            states: of the same rows.
            moco: queue and key encoders, if the stage has them.
        """
        setting, pid_B = self.setting, batch["pid_B"]
        image_BD, text_BD, log_scale = features["image_BD"], features["text_BD"], features["log_scale"]
        parts: dict[str, Tensor] = {}
        if setting.contrastive_weight and moco is not None:
            parts["contrastive"] = moco.loss(image_BD, text_BD, log_scale, batch, states)
        elif setting.contrastive_weight:
            ids_B = pid_B if setting.positives == "identity" else None
            parts["contrastive"] = contrastive_loss(image_BD, text_BD, log_scale, ids_B)
        if setting.sdm_weight:
            parts["sdm"] = sdm_loss(image_BD, text_BD, log_scale, pid_B)
        if setting.alignment_weight:
            parts["alignment"] = alignment_loss(image_BD, text_BD, pid_B)
        if setting.with_prototypes:
            smoothing = setting.label_smoothing
            parts["identity"] = all_identities_contrast(text_BD, self.prototype_CD, pid_B, log_scale, smoothing)
        elif setting.identity_weight:
            parts["identity"] = self._identity(image_BD, text_BD, pid_B)
        if self.cross_modal is not None:
            logits_BLV = self.cross_modal(features["masked_token_BLD"], features["image_token_BND"])
            parts["mlm"] = masked_language_loss(logits_BLV, batch["masked_label_BL"])
        weighted = [getattr(setting, f"{name}_weight") * part for name, part in parts.items()]
        return torch.stack(weighted).sum(), parts | {"logit_scale": log_scale.exp()}

    def _identity(self, image_BD: Tensor, text_BD: Tensor, pid_B: Tensor) -> Tensor:
        """Mean of both modalities' losses under one classifier (IRRA; TextReID's sum has weight 2)."""
        classifier = self._shared[0] if self.classifier is None else self.classifier
        smoothing = self.setting.label_smoothing
        losses = [head_loss(classifier, feature_BD, pid_B, smoothing) for feature_BD in (image_BD, text_BD)]
        return (losses[0] + losses[1]) / 2


def fix_temperature(encoder: DualEncoder, setting: ContrastiveLoss) -> None:
    """Puts a fixed temperature into the encoder, where it is exported; a learned one trains."""
    used = True
    if isinstance(setting, TextLoss):
        used = setting.contrastive_weight > 0 or setting.sdm_weight > 0 or setting.with_prototypes
    encoder.logit_scale.requires_grad_(used and setting.temperature is None)
    if setting.temperature is not None:
        with torch.no_grad():
            encoder.logit_scale.fill_(-math.log(setting.temperature))


def encode_pairs(encoder: DualEncoder, setting: ContrastiveLoss, batch: Batch, known: Features) -> Features:
    """What the losses of a batch of pairs need of the encoder.

    Args:
        encoder: see `DualEncoder.forward`.
        setting: of the losses.
        batch: image_BCHW, token_BL, and masked_token_BL where words are hidden.
        known: features of frozen towers that are there already, as arguments of `DualEncoder.forward`.

    Returns:
        image_BD, text_BD and log_scale; with masked words also image_token_BND and masked_token_BLD; with two class
        tokens also i2i_BD.
    """
    masked = isinstance(setting, TextLoss) and setting.mlm_weight > 0
    everywhere = isinstance(setting, TextLoss) and masked and setting.mask_for == "all"
    token_BL = batch["masked_token_BL" if everywhere else "token_BL"]
    output = encoder(batch["image_BCHW"], token_BL, **known, details=masked)
    log_scale = output.log_scale
    if setting.temperature is not None:  # exactly: the parameter may be a bf16 copy
        log_scale = torch.full_like(log_scale, -math.log(setting.temperature))
    features = {"image_BD": output.image_features, "text_BD": output.text_features, "log_scale": log_scale}
    if output.i2i_features is not None:
        features["i2i_BD"] = output.i2i_features
    if masked:
        features["image_token_BND"] = output.image_tokens
        hidden_BLD = output.text_tokens if everywhere else encoder.text(batch["masked_token_BL"], details=True).tokens
        features["masked_token_BLD"] = hidden_BLD
    return features
