"""Parameter groups, optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reid_dist.config import OptimizerConfig


@dataclass(frozen=True)
class TrainableGroup:
    """Named parameters that train alike: `new` ones have no pretrained weights."""

    new: bool
    parameters: dict[str, nn.Parameter]


def parameter_groups(trainable: Iterable[TrainableGroup], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Optimizer groups: learning rate and weight decay by what a parameter is.

    Matrices decay; biases, norms, embeddings of one dimension and the temperature do not. New layers get
    `new_lr_multiplier` x lr, biases `bias_lr_multiplier` x that.

    Returns:
        Groups with `params`, `names`, `lr`, `base_lr` and `weight_decay`; empty groups are left out.
    """
    grouped: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for group in trainable:
        for name, parameter in group.parameters.items():
            lr = config.lr * (config.new_lr_multiplier if group.new else 1.0)
            if name.endswith("bias"):
                lr *= config.bias_lr_multiplier
            # ds_shape: under ZeRO 3 the parameter itself is an empty placeholder.
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            grouped.setdefault((lr, config.weight_decay if decays else 0.0), {})[name] = parameter
    return [
        {"params": list(named.values()), "names": list(named), "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), named in grouped.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's own optimizer; DeepSpeed's fused ones would need a compiler run on each machine."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Factor of the base learning rate at a 0-based optimizer step: linear warm-up, then the schedule.

    Cosine: half a period from 1 to 0 over the steps after warm-up, so the last step is not exactly 0.
    """
    if step < config.warmup_steps:
        return config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "multistep":
        return float(config.gamma ** sum(step >= milestone for milestone in config.milestones))
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Any, factor: float) -> None:
    """Sets every group's learning rate to its base times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
