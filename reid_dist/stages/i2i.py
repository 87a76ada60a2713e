"""Image-to-image stage, and with text supervision the joint stage of both tasks.

Shape suffixes: B rows of this rank, T of these with captions, D features.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from reid_dist.config import I2ILoss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.pieces import Saved
from reid_dist.stages.base import Stage
from reid_dist.stages.conflict import gradient_cosines
from reid_dist.stages.contract import ALONE, Batch, Features, State, Surroundings, Weights
from reid_dist.stages.image_losses import ImageLosses
from reid_dist.stages.momentum_contrast import MomentumContrast
from reid_dist.stages.text_losses import TextLosses, encode_pairs, fix_temperature

_TEXT = ("text_BD", "masked_token_BLD")


class I2IStage(Stage):
    """L = L_image + w_text L_text (methods.md card 1, stage 1; with all losses its joint arm).

    L_image (`ImageLosses`) is of all images, or in a mix of those without captions (`image_rows`); L_text
    (`TextLosses`) of those with captions. Without text supervision text tower and temperature do not train. With two
    class tokens (HPL, card 4) L_image sees the one that image queries use, L_text the other.

    A batch may have no row for one of the losses (`data.mixing`). Its parameters then get gradients of zero, not none,
    which optimizers treat differently under the ZeRO stages.

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
        loss: I2ILoss,
        freeze: Iterable[str] = (),
        run: Surroundings = ALONE,
        train_prompts: bool = False,
    ) -> None:
        with_text = loss.text_weight > 0
        super().__init__(encoder, freeze if with_text else (*freeze, "text"), train_prompts)
        self.setting = loss
        self.image_losses = ImageLosses(loss, encoder.features, run)
        self.sharded = self.image_losses.sharded
        self.text_losses: TextLosses | None = None
        self._steps = 0
        if with_text and loss.text.mlm_weight:
            encoder.require_tokens("loss.text.mlm_weight")
        if with_text:
            vocabulary = encoder.text_shape.vocab_size
            head = self.image_losses.head
            self.text_losses = TextLosses(loss.text, encoder.features, vocabulary, run.identities, shared=head)
            fix_temperature(encoder, loss.text)
        else:
            encoder.logit_scale.requires_grad_(False)
            encoder.text.requires_grad_(False)  # its prompts too
        if with_text and loss.text.queue_size:
            self.moco = MomentumContrast(encoder, self.frozen, loss.text, run, loss.text.positives, "pid_B")

    def keys(self, batch: Batch) -> State:
        """See `Stage.keys`."""
        if self.moco is None or not (captions := len(batch["token_BL"])):
            return {}
        return super().keys(_captioned(batch, captions))

    def features(self, batch: Batch, state: State) -> Features:
        """See `Stage.features`; i2i_BD of all rows, the rest of the captioned ones."""
        if self.text_losses is None:
            return {"i2i_BD": self.encoder.encode_image(batch["image_BCHW"], task="i2i")}
        captions = len(batch["token_BL"])
        # The text tower runs on padding where there is no caption, and its gradients are zero, not none.
        text = {name: x if captions else x.new_zeros(1, *x.shape[1:]) for name, x in batch.items() if "token" in name}
        features = encode_pairs(self.encoder, self.setting.text, {**batch, **text}, state.get("known", {}))
        features.setdefault("i2i_BD", features["image_BD"])
        if not captions:
            features["log_scale"] = features["log_scale"] + _zero(x for x in features.values() if len(x) == 1)
        rows = _places(batch, captions)
        for name in ("image_BD", "image_token_BND"):
            if name in features and rows is not None:
                features[name] = features[name][rows]
        return {name: x[:captions] if name in _TEXT else x for name, x in features.items()}

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        captions = len(features["text_BD"]) if self.text_losses is not None else 0
        image_loss, image_parts = self._image_loss(features["i2i_BD"], batch, captions)
        if self.text_losses is None:
            return image_loss, image_parts
        parts = dict(image_parts)
        if captions:
            rows = _captioned(batch, captions)
            text_loss, text_parts = self.text_losses(features, rows, states, self.moco)
            parts |= {f"text_{name}" if name in parts else name: part for name, part in text_parts.items()}
        else:
            text_loss = _zero((features["log_scale"], *self.text_losses.parameters()))
        every = self.setting.conflict_every
        if every and captions and "identity" in image_parts and self.training and self._steps % every == 0:
            parts |= gradient_cosines(self.encoder.visual, image_loss, text_loss)
        return image_loss + self.setting.text_weight * text_loss, parts

    def after_step(self, states: Sequence[State], updated: bool, weights: Weights) -> None:
        """See `Stage.after_step`."""
        self._steps += 1
        super().after_step([state for state in states if state], updated, weights)

    def counters(self) -> dict[str, int]:
        """See `Stage.counters`."""
        return {**super().counters(), "steps": self._steps}

    def restore(self, saved: Saved, counters: Mapping[str, int]) -> None:
        """See `Stage.restore`."""
        super().restore(saved, counters)
        self._steps = counters["steps"]

    def _image_loss(self, image_BD: Tensor, batch: Batch, captions: int) -> tuple[Tensor, dict[str, Tensor]]:
        pid_B = batch["pid_B"]
        if self.setting.image_rows == "uncaptioned" and "captioned_B" in batch:
            others = _first(~batch["captioned_B"], len(pid_B) - captions)
            image_BD, pid_B = image_BD[others], pid_B[others]
        if not len(pid_B):
            return _zero((image_BD, *self.image_losses.parameters())), {}
        loss: tuple[Tensor, dict[str, Tensor]] = self.image_losses(image_BD, pid_B)
        return loss


def _captioned(batch: Batch, captions: int) -> Batch:
    """The captioned rows of a batch, T of them; text has no others."""
    rows = _places(batch, captions)
    if rows is None:
        return batch
    whole = ("token_BL", "masked_token_BL", "masked_label_BL", "step_id_S")
    return {name: x if name in whole else x[rows] for name, x in batch.items()}


def _places(batch: Batch, captions: int) -> Tensor | None:
    """Which rows have captions; None: all. Shape: (T,)."""
    return _first(batch["captioned_B"], captions) if "captioned_B" in batch else None


def _first(chosen_B: Tensor, count: int) -> Tensor:
    """The places of so many chosen rows, in order: without waiting for the device, unlike `nonzero`."""
    return chosen_B.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _zero(tensors: Iterable[Tensor]) -> Tensor:
    """0 that depends on tensors: their gradient is zero, not none."""
    return torch.stack([(x * 0).sum() for x in tensors]).sum()
