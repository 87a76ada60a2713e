"""How an image tower cuts its input into patches, and its position embedding at another size.

Shape suffixes: C channels, H rows, W columns, D feature size, N grid positions (+ class token).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from reid_dist.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]
RESNET_EMBEDDING = "visual.attnpool.positional_embedding"


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


def find_patches(visual: nn.Module) -> Patches | None:
    """How a tower cuts its input; None for towers without patches or position embedding."""
    if isinstance(visual, VisionTransformer):
        return Patches(visual.patch_size, visual.conv1.stride, "visual.positional_embedding")
    if isinstance(visual, ModifiedResNet):
        return resnet_patches(visual.layer4[0].stride)
    embed: Any = getattr(visual.trunk, "patch_embed", None) if isinstance(visual, TimmModel) else None
    if not hasattr(embed, "feat_ratio"):
        return None
    size = embed.feat_ratio(as_scalar=False)
    positions = getattr(visual.trunk, "pos_embed", None)
    if not isinstance(positions, Tensor) or positions.dim() != 3:
        return Patches(size, size, None)
    return Patches(size, size, "visual.trunk.pos_embed", positions.shape[1] - math.prod(embed.grid_size))


def resnet_patches(last_stride: int) -> Patches:
    """How a CLIP ResNet cuts its input: 4 pixels in the stem, twice that for each later stage but perhaps the last."""
    size = (16 * last_stride, 16 * last_stride)
    return Patches(size, size, RESNET_EMBEDDING)


def set_image_size(visual: nn.Module, image_size: tuple[int, int]) -> None:
    """Fits towers that open_clip builds at a size of their own: ModifiedResNet knows only squares, timm's one size."""
    if isinstance(visual, ModifiedResNet):
        patches = find_patches(visual)
        assert patches is not None
        _replace_position_embedding(visual.attnpool, math.prod(patches.grid(image_size)) + patches.prefix)
    if isinstance(visual, TimmModel):
        visual.set_input_size(image_size)


def check_image_size(patches: Patches, image_size: tuple[int, int], patch_stride: int | None) -> None:
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


def set_patch_stride(visual: nn.Module, stride: int, image_size: tuple[int, int]) -> None:
    """Makes a ViT's patches overlap: `stride` pixels from one to the next.

    Raises:
        UserError: another tower, or a stride that leaves pixels out.
    """
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
