"""The most memory that one training step needs on a GPU, from a run on tensors without memory.

A step has three high points: somewhere in forward and backward, behind the backward, and in the optimizer's step. What
DeepSpeed holds at each was measured with its own engine (`tests/test_step_memory.py`).
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reid_dist.config import EngineConfig
from reid_dist.engine.deepspeed_engine import deepspeed_config
from reid_dist.stages import Batch, Stage

# DeepSpeed flattens so many gradients at once where it does not shard (ZeRO 0).
_FLATTENED = 500_000_000


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators make, until they are let go; also of fake tensors.

    Attributes:
        live: now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Does not count a tensor that was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator, then counts what is new in its results."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class PassBytes:
    """Beyond the state: the peak of a forward and backward, with the gradients that stay, and without them."""

    with_gradients: int
    without_gradients: int


def pass_bytes(stage: Stage, batch: Batch, bf16: bool) -> PassBytes:
    """Runs a micro-batch forward and backward, twice; on fake tensors it costs no memory."""
    found = list[int]()
    for keep in (True, False):
        stage.zero_grad(set_to_none=True)
        with LiveBytes() as count, _gradients_let_go(stage, keep):
            for tensor in (*stage.parameters(), *stage.buffers(), *batch.values()):
                count.ignore(tensor)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = stage(batch)["loss"]
            loss.backward()
            del loss
        found.append(count.peak)
    stage.zero_grad(set_to_none=True)
    images = sum(tensor.untyped_storage().nbytes() for tensor in batch.values())
    return PassBytes(found[0] + images, found[1] + images)


@contextmanager
def _gradients_let_go(stage: Stage, keep: bool) -> Iterator[None]:
    """Within, a gradient is gone once it is complete, as where ZeRO shards it; not if all are to be kept."""

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad and not keep]
    handles = [
        parameter.register_post_accumulate_grad_hook(let_go)  # type: ignore[no-untyped-call]
        for parameter in trained
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_bytes(
    trainable: int,
    frozen: int,
    passes: PassBytes,
    engine: EngineConfig,
    world_size: int,
    optimizer: Literal["adamw", "adam", "sgd"],
) -> float:
    """Bytes at the highest point of a step on one GPU, without queue and momentum encoders.

    Args:
        trainable: parameters that train.
        frozen: those that do not.
        passes: of a micro-batch of this rank.
        engine: settings.
        world_size: ranks.
        optimizer: its name.
    """
    zero = engine.zero_stage
    weight = 2 if engine.precision == "pure_bf16" else 4
    weights, gradients = weight * (trainable + frozen), weight * trainable
    state = (4 if optimizer == "sgd" else 8) * trainable
    # A step makes fp32 tensors of the size of what it updates: a root of Adam's averages, gradients with an L2 term.
    made = {"adamw": 1, "adam": 2, "sgd": 1}[optimizer]
    if zero == 0:
        flattened = weight * min(trainable, _FLATTENED)
        return weights + state + max(passes.with_gradients, gradients + flattened, gradients + made * 4 * trainable)
    master, part, buckets = 4 * trainable / world_size, gradients / world_size, _bucket_bytes(engine)
    held = state / world_size + master
    step = part + (made + 1) * master  # ZeRO flattens the gradients in fp32 first
    if zero == 1:
        return held + weights + max(passes.with_gradients + buckets, gradients + buckets + part / 2, step)
    if zero == 2:
        return held + weights + max(passes.without_gradients + part + buckets, step)
    # ZeRO 3 keeps what autocast multiplies in bfloat16 too. Weights that are gathered once more stay so for a while.
    half = 2 * (trainable + frozen) if engine.precision == "bf16" else 0
    gathered = weights + half if world_size > 1 else 0
    held += (weights + half) / world_size + buckets
    return held + max(passes.without_gradients + part + gathered, step + master)


def _bucket_bytes(engine: EngineConfig) -> float:
    """Buffers in which ZeRO gathers gradients for their reduction: one for each precision that it sends them in."""
    elements = float(deepspeed_config(engine, 1)["zero_optimization"]["reduce_bucket_size"])
    if engine.precision == "bf16":  # those of layers under autocast, and the rest
        return elements * (4 + 2 if engine.zero_stage == 3 else 4 + 4)
    return elements * (2 if engine.precision == "pure_bf16" else 4)
