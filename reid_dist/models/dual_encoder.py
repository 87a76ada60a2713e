"""The image and text encoders of one model, built from an open_clip architecture or our own JSON file.

Shape suffixes: B batch, C channels, H rows, W columns, L tokens, D feature size, N grid positions (+ class token).
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.row_conv import RowConvTower

Interpolation = Literal["bilinear", "bicubic"]
MAX_LOGIT_SCALE = math.log(100.0)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RESNET_STRIDE = 32


class EncoderOutput(NamedTuple):
    """Features of a batch of pairs, not normalised, and the natural log of the inverse temperature."""

    image_features: Tensor  # (B, D)
    text_features: Tensor  # (B, D)
    log_scale: Tensor  # (1,), fp32


@dataclass(frozen=True)
class TextShape:
    """What a tokenizer must produce for the text tower."""

    context_length: int
    vocab_size: int


class Patches(NamedTuple):
    """How an image tower cuts its input; `size` and `stride` are (height, width) in pixels."""

    size: tuple[int, int]
    stride: tuple[int, int]
    embedding: str | None  # the learned position embedding's name in the encoder; None: no such
    prefix: int = 1  # rows of that before the grid, such as the class token's

    def grid(self, image_size: tuple[int, int], stride: tuple[int, int] | None = None) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width) pixels; `stride`: another than the tower's own."""
        down, right = stride or self.stride
        return (image_size[0] - self.size[0]) // down + 1, (image_size[1] - self.size[1]) // right + 1


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
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        # Set by the engine where the parameter itself is a bf16 copy of an fp32 master.
        self.exact_logit_scale: Tensor | None = None
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Image features, not normalised.

        Args:
            image_BCHW: uint8 in 0..255, or float already normalised. Shape: (B, 3, H, W).

        Returns:
            Shape: (B, D).
        """
        if image_BCHW.dtype == torch.uint8:
            dtype = next(self.visual.parameters()).dtype
            image_BCHW = ((image_BCHW.to(torch.float32) / 255 - self.image_mean) / self.image_std).to(dtype)
        features: Tensor = self.visual(image_BCHW)
        return features

    def encode_text(self, token_BL: Tensor) -> Tensor:
        """Text features, not normalised. Shape: (B, L) -> (B, D)."""
        features: Tensor = self.text(token_BL)
        return features

    def forward(
        self,
        image_BCHW: Tensor,
        token_BL: Tensor,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
    ) -> EncoderOutput:
        """Both towers and the inverse temperature, so that an engine that gathers weights module by module sees all.

        Args:
            image_BCHW: as in `encode_image`.
            token_BL: Shape: (B, L).
            image_features: known already: the image tower does not run. Shape: (B, D).
            text_features: likewise of the text tower. Shape: (B, D).
        """
        log_scale = self.logit_scale.float()
        if self.exact_logit_scale is not None:
            # The master's value with the parameter's gradient: bf16 would round the scale by per cents.
            log_scale = self.exact_logit_scale + (log_scale - log_scale.detach())
        image = self.encode_image(image_BCHW) if image_features is None else image_features
        text = self.encode_text(token_BL) if text_features is None else text_features
        return EncoderOutput(image, text, log_scale)

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


def read_architecture(architecture: str) -> dict[str, Any]:
    """The model's JSON description: a file ending in `.json`, or the name of an open_clip architecture.

    Raises:
        UserError: no such file, no such name (the nearest are offered), or a file that lacks a section.
    """
    if architecture.endswith(".json"):
        try:
            config: dict[str, Any] = json.loads(Path(architecture).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"model.architecture: cannot read {architecture}: {error}") from error
    else:
        known = open_clip.get_model_config(architecture)
        if known is None:
            raise UserError(_unknown_architecture(architecture))
        config = copy.deepcopy(known)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise UserError(f"model.architecture: {architecture} lacks {', '.join(sorted(missing))}")
    return config


def build_dual_encoder(
    architecture: str,
    image_size: tuple[int, int],
    patch_stride: int | None = None,
    image_mean: tuple[float, float, float] = CLIP_MEAN,
    image_std: tuple[float, float, float] = CLIP_STD,
) -> DualEncoder:
    """Builds an encoder with random weights.

    Args:
        architecture: name of an open_clip architecture, or path of a JSON file of the same form, whose `vision_cfg`
            may instead hold `row_conv`: the arguments of `RowConvTower`.
        image_size: (height, width) in pixels.
        patch_stride: stride of a ViT's patch embedding; less than the patch size makes patches overlap.
        image_mean: mean of each channel of images in 0..1.
        image_std: standard deviation of the same.

    Raises:
        UserError: unknown architecture, or a size or stride that it cannot take.
    """
    config = read_architecture(architecture)
    if "multimodal_cfg" in config:
        raise UserError(
            f"model.architecture: {architecture} is a CoCa (multimodal_cfg), whose towers return tokens for a caption"
            " decoder; choose an architecture with two towers, such as ViT-B-16"
        )
    try:
        if "row_conv" in config["vision_cfg"]:
            visual: nn.Module = RowConvTower(config["embed_dim"], **config["vision_cfg"]["row_conv"])
            text: nn.Module = TextTransformer(output_dim=config["embed_dim"], **config["text_cfg"])
        else:
            towers = _open_clip_towers(config, image_size)
            visual, text = towers.visual, towers.text
        patches = find_patches(visual)
        if patches is not None:
            _check_image_size(patches, image_size, patch_stride)
        _set_image_size(visual, image_size)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
    ) as error:  # an unknown key, heads that do not divide ...
        raise UserError(f"model.architecture: {architecture} cannot be built: {error}") from error
    if patch_stride is not None:
        _set_patch_stride(visual, patch_stride, image_size)
    shape = TextShape(int(text.context_length), int(text.vocab_size))  # type: ignore[arg-type]
    return DualEncoder(visual, text, shape, config["embed_dim"], image_mean, image_std)


def _open_clip_towers(config: dict[str, Any], image_size: tuple[int, int]) -> open_clip.CustomTextCLIP:
    """open_clip's towers; its own ViT is built at our image size, the others get it from `_set_image_size`."""
    config = {k: v for k, v in config.items() if k != "custom_text"}
    if not isinstance(config["vision_cfg"].get("layers"), list):
        config["vision_cfg"] = {**config["vision_cfg"], "image_size": image_size}
    return open_clip.CustomTextCLIP(**config, nonscalar_logit_scale=True)


def _set_image_size(visual: nn.Module, image_size: tuple[int, int]) -> None:
    """For towers that open_clip builds at a size of their own: ModifiedResNet knows only squares, timm's one size."""
    if isinstance(visual, ModifiedResNet):
        patches = find_patches(visual)
        assert patches is not None
        _replace_position_embedding(visual.attnpool, math.prod(patches.grid(image_size)) + patches.prefix)
    if isinstance(visual, TimmModel):
        visual.set_input_size(image_size)


def _check_image_size(patches: Patches, image_size: tuple[int, int], patch_stride: int | None) -> None:
    """Refuses sizes of which pixels at the lower and right edge would never be seen, unless a stride asks for it."""
    sides = list(zip(image_size, patches.size, strict=True))
    if all(side >= size and (patch_stride is not None or side % size == 0) for side, size in sides):
        return
    below = "x".join(str(max(1, side // size) * size) for side, size in sides)
    above = "x".join(str(-(-side // size) * size) for side, size in sides)
    nearest = below if below == above else f"{below} or {above}"
    raise UserError(
        f"model.image_size: {image_size[0]}x{image_size[1]} is not made of whole patches of"
        f" {patches.size[0]}x{patches.size[1]} pixels; nearest that work: {nearest}"
    )


def _set_patch_stride(visual: nn.Module, stride: int, image_size: tuple[int, int]) -> None:
    if not isinstance(visual, VisionTransformer):
        raise UserError("model.patch_stride: only open_clip's ViT towers have patches; remove the key")
    if not 0 < stride <= min(visual.patch_size):
        raise UserError(f"model.patch_stride: {stride} is not in 1..{min(visual.patch_size)} (the patch size)")
    visual.conv1.stride = (stride, stride)
    patches = find_patches(visual)
    assert patches is not None
    visual.grid_size = patches.grid(image_size)
    _replace_position_embedding(visual, math.prod(visual.grid_size) + patches.prefix)


def _replace_position_embedding(module: nn.Module, positions: int) -> None:
    old = module.positional_embedding
    assert isinstance(old, Tensor)
    width = old.shape[1]
    module.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(positions, width))


def _can_checkpoint(visual: nn.Module) -> bool:
    if isinstance(visual, TimmModel):
        # open_clip only logs that timm refused.
        try:
            visual.trunk.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            return False
    return not isinstance(visual, ModifiedResNet)


def find_patches(visual: nn.Module) -> Patches | None:
    """How a tower cuts its input; None for towers without patches or position embedding."""
    if isinstance(visual, VisionTransformer):
        return Patches(visual.patch_size, visual.conv1.stride, "visual.positional_embedding")
    if isinstance(visual, ModifiedResNet):
        size = (_RESNET_STRIDE, _RESNET_STRIDE)
        return Patches(size, size, "visual.attnpool.positional_embedding")
    embed: Any = getattr(visual.trunk, "patch_embed", None) if isinstance(visual, TimmModel) else None
    if not hasattr(embed, "feat_ratio"):
        return None
    size = embed.feat_ratio(as_scalar=False)
    positions = getattr(visual.trunk, "pos_embed", None)
    if not isinstance(positions, Tensor) or positions.dim() != 3:
        return Patches(size, size, None)
    return Patches(size, size, "visual.trunk.pos_embed", positions.shape[1] - math.prod(embed.grid_size))


def projection_names(tower: nn.Module) -> set[str]:
    """Names, within a tower, of the parameters of its last linear map, from its own width to D; empty: it has none."""
    projection: Any
    if isinstance(tower, ModifiedResNet):
        projection = tower.attnpool.c_proj
    elif isinstance(tower, RowConvTower):
        projection = tower.projection
    elif isinstance(tower, TextTransformer):
        projection = tower.text_projection
    elif isinstance(tower, TimmModel):
        # Added by open_clip, plain or at the end of an MLP, or what timm calls the classifier.
        head = tower.head
        projection = head.proj if hasattr(head, "proj") else head.mlp.fc2 if hasattr(head, "mlp") else None
        projection = tower.trunk.get_classifier() if projection is None else projection
    else:
        projection = getattr(tower, "proj", None)
    parameters = list(projection.parameters()) if isinstance(projection, nn.Module) else [projection]
    return {name for name, parameter in tower.named_parameters() if any(parameter is p for p in parameters)}


def resize_position_embedding(
    embedding_ND: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    mode: Interpolation = "bilinear",
    prefix: int = 1,
) -> Tensor:
    """Interpolates the grid part of a position embedding and keeps the class row (methods.md section 2).

    Args:
        embedding_ND: prefix first, then the grid row by row. Shape: (prefix + rows * columns, D).
        old_grid: (rows, columns) of `embedding_ND`.
        new_grid: (rows, columns) wanted.
        mode: `bilinear` without antialiasing is what IRRA, CLIP-ReID and TextReID use; open_clip uses `bicubic` with.
        prefix: rows that are not of the grid: 1 for the class token.

    Returns:
        Shape: (prefix + new rows * new columns, D).
    """
    width = embedding_ND.shape[1]
    grid_1DHW = embedding_ND[prefix:].T.reshape(1, width, *old_grid)
    resized = F.interpolate(grid_1DHW, size=new_grid, mode=mode, align_corners=False, antialias=mode == "bicubic")
    return torch.cat([embedding_ND[:prefix], resized.reshape(width, -1).T])


def _unknown_architecture(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    offer = f"; nearest: {', '.join(near)}" if near else ""
    return f"model.architecture: open_clip knows no {name!r}{offer}. A JSON file's name must end in .json"
