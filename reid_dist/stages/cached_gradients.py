"""Accumulation that keeps all negatives of the step: gradients of the features are cached (Gao et al. 2021, GradCache).

1. Each micro-batch runs without gradient; its features and random state are kept (`first_pass`).
2. The loss of the whole step's features gives their gradients, and those of the stage's own heads (`joint_gradients`).
3. Each micro-batch runs again, with gradient and the same random numbers; sum(feature * cached gradient) has, at the
   parameters, the gradient of the big batch's loss (`surrogate`).

Each of the three is one forward in the eyes of an engine, which owns autocast. Exact for towers whose rows do not see
each other. BatchNorm towers normalise each micro-batch by itself, as in plain accumulation; their running statistics
move in the second run only. A head's batch statistics (BNNeck) are those of the whole step.
Shape suffixes: B rows of a micro-batch, A x B those of a step on this rank, D features.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch, Features, State


@dataclass(frozen=True)
class FirstPass:
    """What is kept of a micro-batch's run without gradient."""

    state: State
    features: Features
    random: list[Tensor]


@dataclass(frozen=True)
class JointGradients:
    """Loss of a step on this rank, and its gradients by what the loss saw; what it did not use is left out."""

    loss: Tensor
    metrics: dict[str, Tensor]
    features: list[Features]
    heads: list[tuple[nn.Parameter, Tensor]]


@torch.no_grad()
def first_pass(stage: Stage, batch: Batch) -> FirstPass:
    """Runs a micro-batch for its features alone; running statistics stay as they were."""
    kept = [(buffer, buffer.clone()) for buffer in stage.encoder.buffers()]
    state = stage.keys(batch)
    random = _random_state(batch)
    features = stage.features(batch, state)
    for buffer, value in kept:
        buffer.copy_(value)
    return FirstPass(state, features, random)


def joint_gradients(stage: Stage, batches: Sequence[Batch], passes: Sequence[FirstPass]) -> JointGradients:
    """Loss and gradients of a step of several micro-batches.

    Args:
        stage: the stage.
        batches: what the loss needs of them; no images or tokens.
        passes: of the same micro-batches.
    """
    with torch.enable_grad():
        leaves = {name: x.requires_grad_() for name, x in _joined([first.features for first in passes]).items()}
        heads = [p for name, p in stage.named_parameters() if p.requires_grad and not name.startswith("encoder.")]
        loss, metrics = stage.loss(leaves, _joined(batches), [first.state for first in passes])
        with torch.autocast(loss.device.type, enabled=False):
            beside = stage.leaves()
            found = torch.autograd.grad(loss, [*leaves.values(), *heads, *beside], allow_unused=True)
    by_name = {name: x for name, x in zip(leaves, found, strict=False) if x is not None}
    by_head = [(p, x) for p, x in zip(heads, found[len(leaves) :], strict=False) if x is not None]
    for leaf, x in zip(beside, found[len(leaves) + len(heads) :], strict=True):
        leaf.grad = x  # no engine averages it or asks for it in every micro-batch
    detached = {name: value.detach() for name, value in metrics.items()}
    return JointGradients(loss.detach(), detached, _shared_out(by_name, passes), by_head)


def surrogate(stage: Stage, batch: Batch, first: FirstPass, cached: JointGradients, index: int) -> Tensor:
    """Runs a micro-batch again; the mean of this over a step's micro-batches has the gradient of the step's loss.

    Args:
        stage: the stage.
        batch: the micro-batch of number `index`.
        first: what its first run left.
        cached: gradients of the step.
        index: which micro-batch.

    Returns:
        Scalar; its value means nothing.
    """
    with _replayed(first.random, batch):
        features = stage.features(batch, first.state)
    count = len(cached.features)
    weights = cached.features[index]
    terms = [_product(features[name], weight) for name, weight in weights.items() if features[name].requires_grad]
    # Heads and shared values in every micro-batch, so that all micro-batches reach the same parameters.
    terms += [_product(parameter, gradient / count) for parameter, gradient in cached.heads]
    return count * torch.stack(terms).sum()


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows one after the other; what is not by row is the same in all parts."""
    return {
        name: torch.cat([part[name] for part in parts]) if _by_row(name) else value.clone()
        for name, value in parts[0].items()
    }


def _shared_out(gradients: Features, passes: Sequence[FirstPass]) -> list[Features]:
    """Each micro-batch's rows of the gradients, and its share of what is not by row."""
    count = len(passes)  # of equal size: the plan's micro-batches are
    parts = {name: torch.chunk(x, count) if _by_row(name) else [x / count] * count for name, x in gradients.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


def _by_row(name: str) -> bool:
    """Whether the shape suffix says so: image_BD, pid_B, but not log_scale or step_id_S."""
    return name.rpartition("_")[2].startswith("B")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Scalar whose gradient at x is the weight; at least fp32, since engines scale it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * weight.to(wide)).sum()


def _random_state(batch: Batch) -> list[Tensor]:
    device = batch["image_BCHW"].device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def _replayed(random: list[Tensor], batch: Batch) -> Iterator[None]:
    """The random numbers of the first run; behind it those that would have come."""
    device = batch["image_BCHW"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(random[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(random[1], device)
        yield
