"""Convolutional image towers of libraries: CLIP's ResNets and timm's models, with TextReID's changes.

Shape suffixes: B batch, H rows, W columns, D feature size.
"""

from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import nn

from reid_dist.errors import UserError
from reid_dist.models.linear import redraw, redrawn_linears
from reid_dist.models.tower import Projects


class ResNetTower(Projects, ModifiedResNet):  # type: ignore[misc]  # open_clip has no types
    """A built CLIP ResNet's own parts under their own names. Shape: (B, 3, H, W) -> (B, D)."""

    def __init__(self, tower: ModifiedResNet) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(tower.__dict__)


class TimmTower(Projects, TimmModel):  # type: ignore[misc]  # open_clip has no types
    """A built timm model's own parts under their own names. Shape: (B, 3, H, W) -> (B, D)."""

    def __init__(self, tower: TimmModel) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(tower.__dict__)


def keep_last_resolution(visual: nn.Module) -> None:
    """Gives the last stage stride 1, so that its map has twice the rows and columns (Luo et al. 2019, "last stride").

    Only strides change: the weights are those of stride 2. The map of 384x128 pixels becomes 24x8 in place of 12x4.

    Raises:
        UserError: a tower other than a ResNet of CLIP or timm.
    """
    stage = getattr(visual.trunk if isinstance(visual, TimmModel) else visual, "layer4", None)
    if not isinstance(stage, nn.Sequential) or not isinstance(visual, ModifiedResNet | TimmModel):
        raise UserError("model.last_stride: only ResNets, CLIP's and timm's, have a last stage; remove the key")
    block: Any = stage[0]
    for name, module in [*block.named_modules()]:
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):
            # CLIP's blocks and timm's "d" variants pool before a convolution of stride 1.
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent), own, nn.Identity())
    block.stride = 1


def redraw_attention_pool(visual: nn.Module) -> None:
    """Draws the projections of a CLIP ResNet's attention pool anew: TextReID's initialisation trap (methods.md 3.3).

    Convolutions, normalisation and the pool's position embedding stay. Draws from torch's global generator.

    Raises:
        UserError: another tower.
    """
    if not isinstance(visual, ModifiedResNet):
        raise UserError("model.attention_pool: only CLIP's ResNets, such as RN50, have one; remove the key")
    for linear in redrawn_linears(visual).values():
        redraw(linear)
