"""A small convolutional image tower that learns in minutes on two CPU cores.

Shape suffixes: B batch, C channels, H rows, W columns, R stripes, D feature size.

No batch statistics: a rank's features never depend on which other images share its batch, so N ranks equal one.
SiLU and not ReLU: rounding that flips a unit at its kink moves a gradient by 1e-4, and N ranks would only nearly equal
one. Weight-standardised convolutions make up for what GroupNorm alone loses at this size.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reid_dist.models.tower import Projects, TowerOutput


class StandardizedConv2d(nn.Conv2d):
    """Convolution whose filters are normalised to zero mean and unit variance (Qiao et al. 2019)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolves with the standardised filters. Shape: (B, C_in, H, W) -> (B, C_out, H', W')."""
        weight = self.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        # Scaled to keep the variance of the activations: fan-in filters of unit variance would multiply it.
        fan_in = weight[0].numel()
        weight = (weight - mean) * torch.rsqrt(variance * fan_in + 1e-5)
        return F.conv2d(x_BCHW, weight, self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a projected shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = StandardizedConv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = StandardizedConv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = StandardizedConv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Shape: (B, C_in, H, W) -> (B, C, H / stride, W / stride)."""
        y_BCHW = F.silu(self.norm1(self.conv1(x_BCHW)))
        y_BCHW = self.norm2(self.conv2(y_BCHW))
        return F.silu(y_BCHW + self.shortcut(x_BCHW))


class StripeProjection(nn.Linear):
    """A linear map of all stripes together: each has its own part of the weight."""

    def __init__(self, width: int, rows: int, features: int) -> None:
        super().__init__(rows * width, features)
        self.rows = rows

    def forward(self, stripe_BCR: Tensor, apart: bool = False) -> Tensor:
        """Features, or what each stripe adds to them before the bias. Shape: (B, C, R) -> (B, D), or (B, R, D)."""
        if not apart:
            return super().forward(stripe_BCR.flatten(1))
        return torch.einsum("bcr,dcr->brd", stripe_BCR, self.weight.view(self.out_features, -1, self.rows))


class RowConvTower(Projects, nn.Module):
    """Stride-2 stem, residual blocks (the first keeps the resolution, the others halve it), row pooling, projection.

    Body parts lie in rows, so each of `rows` horizontal stripes keeps its own place in the projection's input. Its
    tokens are the features, in a class token's place, and the stripes; features for image queries (`dual_token`) come
    from a second projection, which begins as a copy of the first.
    """

    gives_tokens = True

    def __init__(
        self,
        embed_dim: int,
        widths: Sequence[int] = (32, 64, 128),
        groups: int = 8,
        rows: int = 8,
        dual_token: bool = False,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.gradient_checkpointing = False
        self.stem = StandardizedConv2d(3, widths[0], 3, 2, 1, bias=False)
        self.stem_norm = nn.GroupNorm(groups, widths[0])
        widths_in = (widths[0], *widths[:-1])
        self.blocks = nn.ModuleList(
            ResidualBlock(width_in, width, 1 if i == 0 else 2, groups)
            for i, (width_in, width) in enumerate(zip(widths_in, widths, strict=True))
        )
        self.projection = StripeProjection(widths[-1], rows, embed_dim)
        self.projection_i2i = copy.deepcopy(self.projection) if dual_token else None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks in backward; the name is open_clip's, so all towers share it."""
        self.gradient_checkpointing = enable

    def forward(self, image_BCHW: Tensor, details: bool = False) -> Tensor | TowerOutput:
        """Features, or with `details` also the 1 + rows tokens. Shape: (B, 3, H, W) -> (B, D)."""
        x_BCHW = F.silu(self.stem_norm(self.stem(image_BCHW)))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BCHW = checkpoint(block, x_BCHW, use_reentrant=False)
            else:
                x_BCHW = block(x_BCHW)
        # The mean over the columns of each stripe; a plain reshape when the rows divide the height.
        stripe_BCR = F.adaptive_avg_pool2d(x_BCHW, (self.rows, 1)).squeeze(-1)
        features_BD: Tensor = self.projection(stripe_BCR)
        if not details:
            return features_BD
        tokens_BND = torch.cat([features_BD[:, None], self.projection(stripe_BCR, apart=True)], dim=1)
        return TowerOutput(
            features_BD, tokens_BND, None if self.projection_i2i is None else self.projection_i2i(stripe_BCR)
        )
