"""Linear maps drawn the way TextReID draws them, and which of a tower's its initialiser reaches (methods.md 3.3)."""

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn


def new_linear(features_in: int, features_out: int) -> nn.Linear:
    """A linear map with weights as `redraw` draws them."""
    linear = nn.Linear(features_in, features_out)
    redraw(linear)
    return linear


@torch.no_grad()
def redraw(linear: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Weights from N(0, 2 / features out) (He et al. 2015, fan-out), bias 0.

    Args:
        linear: changed in place.
        generator: on the CPU, whatever the map's device: all ranks and machines draw the same.
    """
    if linear.weight.is_meta:
        return
    drawn = torch.empty(linear.weight.shape)
    nn.init.kaiming_normal_(drawn, mode="fan_out", generator=generator)
    linear.weight.copy_(drawn)
    if linear.bias is not None:
        linear.bias.zero_()


def redrawn_linears(tower: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps inside a tower that TextReID's code draws anew after the weights have been loaded.

    They are the four of a CLIP ResNet's attention pool, and the one behind a dictionary whose vectors do not fit the
    GRU; by name within the tower. The published query and key encoders draw them independently.
    """
    names = {"attnpool.q_proj", "attnpool.k_proj", "attnpool.v_proj", "attnpool.c_proj"}
    names = names if isinstance(tower, ModifiedResNet) else {"word_map"}
    return {name: module for name, module in tower.named_modules() if name in names and isinstance(module, nn.Linear)}
