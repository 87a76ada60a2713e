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
    """Optimizer groups: learning rate and weight decay by what a parameter is, or by `rules` on its name.

    Without rules matrices decay; biases, norms, embeddings of one dimension and the temperature do not. New layers get
    `new_lr_multiplier` x lr, biases `bias_lr_multiplier` x that.

    With rules every parameter starts from `lr` and `weight_decay`, norms too. Each rule whose words its name contains
    sets what it gives, in order, so that a later rule replaces an earlier one: the way of IRRA's and TextReID's code.

    Returns:
        Groups with `params`, `names`, `lr`, `base_lr` and `weight_decay`; empty groups are left out.
    """
    grouped: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for group in trainable:
        for name, parameter in group.parameters.items():
            setting = _by_rules(name, config) if config.rules else _by_kind(name, parameter, group.new, config)
            grouped.setdefault(setting, {})[name] = parameter
    return [
        {"params": list(named.values()), "names": list(named), "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), named in grouped.items()
    ]


def _by_kind(name: str, parameter: nn.Parameter, new: bool, config: OptimizerConfig) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter, where there are no rules."""
    lr = config.lr * (config.new_lr_multiplier if new else 1.0)
    if name.endswith("bias"):
        lr *= config.bias_lr_multiplier
    # ds_shape: under ZeRO 3 the parameter itself is an empty placeholder.
    decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    return lr, config.weight_decay if decays else 0.0


def _by_rules(name: str, config: OptimizerConfig) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter by the rules on its name."""
    factor, weight_decay = 1.0, config.weight_decay
    for rule in config.rules:
        if any(part in name for part in rule.contains):
            factor = factor if rule.lr is None else rule.lr
            weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
    return config.lr * factor, weight_decay


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's own optimizer; DeepSpeed's fused ones would need a compiler run on each machine."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return adam(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def state_names(config: OptimizerConfig) -> tuple[str, ...]:
    """What torch's optimizer keeps of a parameter, under its own names; `step` is a count, the others are tensors."""
    if config.name == "sgd":
        return ("momentum_buffer",) if config.momentum else ()
    return ("exp_avg", "exp_avg_sq", "step")


def lr_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Factor of the base learning rate at a 0-based optimizer step: linear warm-up, then the schedule.

    Cosine: half a period from 1 to 0 over the steps after warm-up, so the last step is not exactly 0.

    With `schedule_every` the factor of the first of so many steps holds for all of them. With an epoch's steps, and
    warm-up and milestones of whole epochs, it is a schedule that is stepped once per epoch: for E epochs and w of
    warm-up, epoch e has start + (1 - start) e / w, then (1 + cos(pi (e - w) / (E - w))) / 2.
    """
    # A last, shorter epoch counts as one.
    total_steps = -(-total_steps // config.schedule_every) * config.schedule_every
    step = step // config.schedule_every * config.schedule_every
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
