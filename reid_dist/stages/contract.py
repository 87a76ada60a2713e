"""The words that stages, engine and trainer share."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from reid_dist.config import OptimizerConfig
from reid_dist.data.tokenizer import Tokenizer

Batch = dict[str, Tensor]
# Names whose shape suffix begins with B (_BD, _BND) hold a row for each sample, others (log_scale) one value for all.
Features = dict[str, Tensor]
State = dict[str, Any]
Weights = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]  # full fp32 tensors of the parameters named


class StageOutput(TypedDict):
    """What one forward gives: the loss to differentiate, parts of it to log, and what `after_step` needs."""

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


@dataclass(frozen=True)
class Surroundings:
    """What a stage must know of its run.

    Attributes:
        rows: samples of one rank and micro-step.
        device: where it will train.
        precision: the engine's.
        seed: of random keys, the same on all ranks.
        identities: training identities, the size of a classifier.
        tokenizer: of captions.
        handed: what the stage before left for this one, by name.
        optimizer: of the stage, for what it trains beside the engine; `build_stage` knows it.
        max_grad_norm: the engine's; likewise.
    """

    rows: int = 0
    device: torch.device | str = "cpu"
    precision: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    seed: int = 0
    identities: int = 0
    tokenizer: Tokenizer | None = None
    handed: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    max_grad_norm: float = 0.0


ALONE = Surroundings()
