"""Identity prompt stage: sentences of identities learn from images, which then learn from the sentences (CLIP-ReID).

Shape suffixes: B rows, L tokens, M learned tokens, W width of a token, C identities, D features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reid_dist.config import IdentityPromptLoss
from reid_dist.errors import UserError
from reid_dist.losses.prototype import identity_text_contrast
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.identity_prompts import IdentityPrompts
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch, Features, State, Surroundings

IDENTITY_TEXT = "identity_text_CD"
_LOG_SCALE = "identity_text_log_scale"
_AT_ONCE = 256


class IdentityPromptStage(Stage):
    """L = L_i2t + L_t2i with both towers frozen (Li, Sun & Li, AAAI 2023, first stage); only the sentences train.

    An image meets the sentence of its identity, "a photo of a [X]1 .. [X]M person.", whose M tokens nobody shares. What
    the i2i stage after it gets are the text features of all sentences (`IdentityText`).

    Args:
        encoder: see `Stage`.
        loss: settings.
        run: the run that the stage is of.

    Raises:
        UserError: a text tower that takes no learned tokens, or a sentence that does not fit into it.
    """

    def __init__(self, encoder: DualEncoder, loss: IdentityPromptLoss, run: Surroundings) -> None:
        super().__init__(encoder, ("visual", "text"))
        encoder.logit_scale.requires_grad_(False)
        self.log_scale: Tensor | None = None
        if loss.products == "cosine":
            # A copy: under ZeRO 3 a module's own parameters are there only in its forward.
            log_scale = encoder.logit_scale.detach().to(run.device, torch.float32, copy=True)
            self.log_scale = log_scale if loss.temperature is None else log_scale.fill_(-math.log(loss.temperature))
        self.prompts = IdentityPrompts(encoder.text, run.tokenizer, loss.template, loss.tokens, run.identities)

    def features(self, batch: Batch, state: State) -> Features:
        """See `Stage.features`."""
        image_BD = self.encoder.encode_image(batch["image_BCHW"], task="i2i")
        return {"image_BD": image_BD, "text_BD": self._read(batch["pid_B"])}

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        loss = identity_text_contrast(features["image_BD"], features["text_BD"], batch["pid_B"], self.log_scale)
        return loss, {"identity_text": loss}

    @torch.no_grad()
    def handover(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Text features of all sentences, and the scale of their cosines unless plain products are compared."""
        label_C = torch.arange(self.prompts.identities, device=self.prompts.token_L.device)
        text_CD = torch.cat([self._read(label_C[i : i + _AT_ONCE]) for i in range(0, len(label_C), _AT_ONCE)])
        return {IDENTITY_TEXT: text_CD.float()} | ({} if self.log_scale is None else {_LOG_SCALE: self.log_scale})

    def _read(self, label_B: Tensor) -> Tensor:
        token_BL, inserted_BMW = self.prompts(label_B)
        text_BD: Tensor = self.encoder.text(token_BL, inserted_BMW=inserted_BMW, at=self.prompts.at)
        return text_BD


class IdentityText(NamedTuple):
    """What an identity prompt stage leaves, for `all_identities_contrast`."""

    text_CD: Tensor  # fp32, in the order of the labels
    log_scale: Tensor | None  # of cosines; None: plain products


def identity_text(run: Surroundings) -> IdentityText:
    """Takes over what the stage before has learned.

    Args:
        run: of the stage that wants it.

    Raises:
        UserError: the stage before has left nothing, or sentences of other identities.
    """
    handed: Mapping[str, Tensor] = run.handed
    if IDENTITY_TEXT not in handed:
        raise UserError(
            "loss.identity_text_weight: the stage before has left no sentences of identities; put a stage of kind"
            " identity_prompt before it"
        )
    text_CD = handed[IDENTITY_TEXT].to(run.device, torch.float32)
    if len(text_CD) != run.identities:
        raise UserError(
            f"loss.identity_text_weight: there are {run.identities} training identities, but the stage before has"
            f" learned sentences of {len(text_CD)}; give both stages the same data.train and data.exclude"
        )
    log_scale = handed.get(_LOG_SCALE)
    return IdentityText(text_CD, None if log_scale is None else log_scale.to(run.device))
