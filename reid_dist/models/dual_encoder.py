"""The image and text encoders of one model behind one module.

Shape suffixes: B batch, C channels, H rows, W columns, L tokens, N image tokens, D feature size.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.tower import TowerOutput
from reid_dist.models.word_tower import WordGRU

Task = Literal["t2i", "i2i"]
MAX_LOGIT_SCALE = math.log(100.0)
_FIRST_LOG_SCALE = math.log(1 / 0.07)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SECOND = ("class_embedding_i2i", "projection_i2i")  # how towers name what image queries have of their own


class EncoderOutput(NamedTuple):
    """Features of a batch of pairs, not normalised, and the natural log of the inverse temperature."""

    image_features: Tensor  # (B, D)
    text_features: Tensor  # (B, D)
    log_scale: Tensor  # (1,), fp32
    image_tokens: Tensor | None = None  # (B, N, D), see `TowerOutput`; None unless details were asked for
    text_tokens: Tensor | None = None  # (B, L, D), likewise
    i2i_features: Tensor | None = None  # (B, D), for image queries; None: the image tower has no second class token


@dataclass(frozen=True)
class TextShape:
    """What a tokenizer must produce for the text tower."""

    context_length: int
    vocab_size: int


class DualEncoder(nn.Module):
    """`visual`, `text` and `logit_scale`; images come in as uint8 and are normalised here.

    `features` is D, the size of both towers' features.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module,
        text_shape: TextShape,
        features: int,
        image_mean: tuple[float, float, float] = CLIP_MEAN,
        image_std: tuple[float, float, float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        self.text_shape = text_shape
        self.features = features
        # One element, not a scalar: deepspeed.initialize cannot broadcast a 0-dimensional parameter.
        self.logit_scale = nn.Parameter(torch.full((1,), _FIRST_LOG_SCALE))
        # Set by the engine where the parameter itself is a bf16 copy of an fp32 master.
        self.exact_logit_scale: Tensor | None = None
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    @property
    def has_i2i_token(self) -> bool:
        """Whether image queries have features of their own (model.dual_token)."""
        return any(getattr(self.visual, name, None) is not None for name in _SECOND)

    @torch.no_grad()
    def replace_first_scale(self, scale: float) -> None:
        """Sets the inverse temperature, unless it was loaded or trained: then it is no longer the first one."""
        first = torch.full_like(self.logit_scale, _FIRST_LOG_SCALE)
        chosen = torch.full_like(self.logit_scale, math.log(scale))
        self.logit_scale.copy_(torch.where(self.logit_scale == first, chosen, self.logit_scale))

    def prompts(self) -> dict[str, nn.Parameter]:
        """The learned prompts of both towers by name; a tower without any has no entry."""
        found = {f"{tower}.prompts": getattr(getattr(self, tower), "prompts", None) for tower in ("visual", "text")}
        return {name: prompts for name, prompts in found.items() if prompts is not None}

    def new_parameters(self) -> set[str]:
        """Names of what no image-text model brings: prompts, further linear maps, words and a GRU."""
        added = ["visual.prompts", "text.prompts", "visual.projection_head.", "text.projection_head."]
        added += ["text."] if isinstance(self.text, WordGRU) else []
        return {name for name, _ in self.named_parameters() if name.startswith(tuple(added))}

    def require_tokens(self, key: str) -> None:
        """Refuses towers that cannot give `details`.

        Args:
            key: of the configuration, which asks for them.

        Raises:
            UserError: the tower is named.
        """
        for name, tower in (("image", self.visual), ("text", self.text)):
            if not getattr(tower, "gives_tokens", False):
                raise UserError(
                    f"{key}: this architecture's {name} tower gives no tokens; remove the key, or choose an open_clip"
                    " ViT with its text transformer, such as ViT-B-16"
                )

    def encode_image(self, image_BCHW: Tensor, task: Task = "t2i") -> Tensor:
        """Image features, not normalised.

        Args:
            image_BCHW: uint8 in 0..255, or float already normalised. Shape: (B, 3, H, W).
            task: image queries have features of their own in a tower with a second class token.

        Returns:
            Shape: (B, D).
        """
        image_BCHW = self._normalize(image_BCHW)
        if task == "i2i" and self.has_i2i_token:
            output: TowerOutput = self.visual(image_BCHW, details=True)
            assert output.i2i_features is not None
            return output.i2i_features
        features: Tensor = self.visual(image_BCHW)
        return features

    def encode_text(self, token_BL: Tensor) -> Tensor:
        """Text features, not normalised. Shape: (B, L) -> (B, D)."""
        features: Tensor = self.text(token_BL)
        return features

    def for_task(self, task: Task) -> "TaskEncoder":
        """What evaluation of a task calls."""
        return TaskEncoder(self, task)

    def forward(
        self,
        image_BCHW: Tensor,
        token_BL: Tensor,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        details: bool = False,
    ) -> EncoderOutput:
        """Both towers and the inverse temperature, so that an engine that gathers weights module by module sees all.

        Args:
            image_BCHW: as in `encode_image`.
            token_BL: Shape: (B, L).
            image_features: known already: the image tower runs only for `details`. Shape: (B, D).
            text_features: likewise of the text tower. Shape: (B, D).
            details: also the tokens of both towers.
        """
        log_scale = self.logit_scale.float()
        if self.exact_logit_scale is not None:
            # The master's value with the parameter's gradient: bf16 would round the scale by per cents.
            log_scale = self.exact_logit_scale + (log_scale - log_scale.detach())
        image_tokens = text_tokens = i2i_features = None
        if details or (self.has_i2i_token and image_features is None):
            image_features, tokens, i2i_features = self.visual(self._normalize(image_BCHW), details=True)
            image_tokens = tokens if details else None
        elif image_features is None:
            image_features = self.encode_image(image_BCHW)
        if details:
            text_features, text_tokens, _ = self.text(token_BL, details=True)
        elif text_features is None:
            text_features = self.encode_text(token_BL)
        assert image_features is not None and text_features is not None
        return EncoderOutput(image_features, text_features, log_scale, image_tokens, text_tokens, i2i_features)

    def _normalize(self, image_BCHW: Tensor) -> Tensor:
        if image_BCHW.dtype != torch.uint8:
            return image_BCHW
        dtype = next(self.visual.parameters()).dtype
        return ((image_BCHW.to(torch.float32) / 255 - self.image_mean) / self.image_std).to(dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of both towers in backward: less memory, more time.

        Raises:
            UserError: a tower that would ignore it.
        """
        if enable and not _can_checkpoint(self.visual):
            raise UserError(
                "model.gradient_checkpointing: this architecture's image tower cannot recompute its blocks; remove the"
                " key, or lower data.global_batch_size to save memory"
            )
        self.visual.set_grad_checkpointing(enable)  # type: ignore[operator]
        self.text.set_grad_checkpointing(enable)  # type: ignore[operator]


class TaskEncoder(nn.Module):
    """The encoder as one retrieval task sees it: not a copy."""

    def __init__(self, encoder: DualEncoder, task: Task) -> None:
        super().__init__()
        self.encoder, self.task = encoder, task

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """The task's image features. Shape: (B, 3, H, W) -> (B, D)."""
        return self.encoder.encode_image(image_BCHW, self.task)

    def encode_text(self, token_BL: Tensor) -> Tensor:
        """Text features. Shape: (B, L) -> (B, D)."""
        return self.encoder.encode_text(token_BL)


def _can_checkpoint(visual: nn.Module) -> bool:
    if isinstance(visual, TimmModel):
        # open_clip only logs that timm refused.
        try:
            visual.trunk.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            return False
    return not isinstance(visual, ModifiedResNet)
