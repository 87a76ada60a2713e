"""What the ranks of a training step send each other: the engine's collectives and those of stage and queue.

The engine's are as DeepSpeed 0.19 makes them (`tests/planning/test_traffic.py` listens to it): all-reduces of the
gradients at ZeRO 0, and at ZeRO 1 and 2 too, whose ranks then keep their part (`use_multi_rank_bucket_allreduce`). The
stage's are counted: it runs on tensors without memory as one rank of many that do not exist.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reid_dist.config import EngineConfig
from reid_dist.engine.deepspeed_engine import deepspeed_config
from reid_dist.planning.links import Links
from reid_dist.stages import Stage

Kind = Literal["gradients", "weights", "features, keys", "averages"]
KINDS: tuple[Kind, ...] = ("gradients", "weights", "features, keys", "averages")
# What torch calls them. All-reduces send what they reduce twice: once to sum it, once to hand the sums out.
_ROUNDS = {
    "allreduce_": 2,
    "allgather_": 1,
    "_allgather_base_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "alltoall_base_": 1,
    "alltoall_": 1,
    "broadcast_": 1,
}
# DeepSpeed's defaults, in elements.
_PREFETCH, _PERSISTENT, _GATHER_BUCKET, _KEPT = 50_000_000, 100_000, 500_000_000, 1_000_000_000
# Exactly these classes DeepSpeed takes for safe in half precision.
_SAFE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind that a rank takes part in, in a step.

    Attributes:
        kind: what travels.
        whole_bytes: of all ranks' parts together, or of what is summed.
        calls: collectives.
        rounds: 2 for an all-reduce, else 1.
    """

    kind: Kind
    whole_bytes: float
    calls: int = 1
    rounds: int = 1

    def sent_bytes(self, world: int) -> float:
        """By each rank, in a ring."""
        return self.rounds * self.whole_bytes * (world - 1) / world

    def seconds(self, world: int, links: Links) -> float:
        """Of all calls, one after the other."""
        steps = self.calls * self.rounds * math.log2(world)
        return (steps * links.latency_ms(world) + links.transfer_ms(world, self.sent_bytes(world))) / 1e3


@dataclass(frozen=True)
class Sizes:
    """Parameters of a stage as an engine sends them.

    Attributes:
        trainable, frozen: elements.
        narrow: trainable elements whose gradients travel in bf16 under autocast.
        groups: of the optimizer.
        persistent: elements of trainable tensors that ZeRO 3 keeps whole; persistent_tensors: how many there are.
        gathered: elements of all other tensors.
    """

    trainable: int
    frozen: int
    narrow: int
    groups: int
    persistent: int
    persistent_tensors: int
    gathered: int


def parameter_sizes(stage: Stage, groups: int) -> Sizes:
    """Counts the parameters of a stage.

    Args:
        stage: as the engine gets it.
        groups: of its optimizer.
    """
    parameters = list(stage.parameters())
    safe = {id(p) for module in stage.modules() if type(module) in _SAFE for p in module.parameters(recurse=False)}
    trained = [p for p in parameters if p.requires_grad]
    kept = [p for p in trained if p.numel() <= _PERSISTENT]
    return Sizes(
        trainable=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        narrow=sum(p.numel() for p in trained if id(p) in safe),
        groups=groups,
        persistent=sum(p.numel() for p in kept),
        persistent_tensors=len(kept),
        gathered=sum(p.numel() for p in parameters if p.numel() > _PERSISTENT),
    )


def engine_exchanges(sizes: Sizes, engine: EngineConfig, averaged: int, averaged_tensors: int) -> list[Exchange]:
    """What DeepSpeed's ranks send in an optimizer step.

    Args:
        sizes: of the parameters.
        engine: settings.
        averaged: elements that momentum encoders follow.
        averaged_tensors: how many tensors they are.
    """
    zero, pure = engine.zero_stage, engine.precision == "pure_bf16"
    width = 2 if pure else 4
    # ZeRO 0 and 1 keep the sum of a step's micro-batches and reduce it once; 2 and 3 hold their part alone.
    times = engine.gradient_accumulation_steps if zero >= 2 else 1
    narrow = sizes.narrow if engine.precision == "bf16" and zero else 0
    gradients = width * (sizes.trainable - narrow) + 2 * narrow
    bucket = float(deepspeed_config(engine, 1)["zero_optimization"]["reduce_bucket_size"])
    buckets = math.ceil(sizes.trainable / (bucket if zero else _GATHER_BUCKET)) + (narrow > 0)
    found = [Exchange("gradients", times * gradients, times * buckets, 1 if zero == 3 else 2)]
    if zero in (1, 2):
        calls = sizes.groups * math.ceil(sizes.trainable / sizes.groups / _GATHER_BUCKET)
        found.append(Exchange("weights", width * sizes.trainable, calls))
    if zero == 3:
        # Gathered again for the backward: DeepSpeed keeps up to so many elements until then.
        micro = engine.gradient_accumulation_steps * (2 if sizes.gathered > _KEPT else 1)
        found.append(Exchange("weights", micro * width * sizes.gathered, micro * math.ceil(sizes.gathered / _PREFETCH)))
        found.append(Exchange("weights", width * sizes.persistent, sizes.persistent_tensors))
    if averaged and pure:  # their fp32 masters lie in pieces
        found.append(Exchange("averages", 4 * averaged, averaged_tensors, 2))
    return found


class Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the collectives that run within, fake or real, as exchanges of features and keys."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Exchange] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator; of a collective the larger side is what all ranks have together."""
        if func.namespace == "c10d" and func._opname in _ROUNDS:
            sides = (args[0],) if func._opname in ("allreduce_", "broadcast_") else args[:2]
            whole = max(_nbytes(side) for side in sides)
            self.found.append(Exchange("features, keys", whole, 1, _ROUNDS[func._opname]))
        return func(*args, **(kwargs or {}))


def _nbytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))
