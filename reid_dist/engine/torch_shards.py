"""Sharding a stage over the ranks with torch's FSDP2, and what each rank then holds of a tensor.

FSDP2 cuts dimension 0: of n rows, rank w of W holds ceil(n / W) from w * ceil(n / W) on, one range of the flat tensor.
Between `release` and `gather` a module's parameters are these shards (`DTensor`), afterwards they are whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from reid_dist.distributed import rank, world_size
from reid_dist.pieces import Piece, Saved, read_whole, shared_out
from reid_dist.stages import Stage


def shard(stage: Stage, zero_stage: int, device: torch.device) -> None:
    """Gives each rank its rows of the parameters, in place; `zero_stage` is 1, 2 or 3 as in `TorchEngine`.

    By torch itself: Accelerate 1.15 prepares FSDP2 on GPUs only, wants the class names of all blocks, and gives a child
    with "Norm" in its class name a group of its own.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    # Where weights are to be whole all the time, those that never change need no gathering.
    whole = set() if zero_stage == 3 else {p for p in stage.parameters() if not p.requires_grad}
    for module in [*(_blocks(stage) if zero_stage > 1 else ()), stage]:
        fully_shard(module, mesh=mesh, reshard_after_forward=zero_stage == 3, ignored_params=whole)
    assert isinstance(stage, FSDPModule)
    stage.set_reshard_after_backward(zero_stage == 3)


def _blocks(stage: Stage) -> Iterator[nn.Module]:
    """The numbered layers of both towers, `transformer.resblocks.3`; not those within one, and none without weights.

    Heads are left whole within a forward: stages look at their parameters from outside.
    """
    found: list[str] = []
    for name, module in stage.encoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name.rpartition(".")[2].isdigit() and not inside and any(True for _ in module.parameters()):
            found.append(name)
            yield module


def gather(stage: Stage) -> None:
    """Makes the parameters whole. Collective, unless they are already."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def release(stage: Stage) -> None:
    """Leaves each rank its shards; needed before these change."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(x: Tensor) -> Tensor:
    """What this rank holds of a parameter, gradient or moment: the memory itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of it; collective where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def pieces_of(part: str, name: str, x: Tensor) -> Iterator[Piece]:
    """This rank's piece of a parameter or moment, none where it holds nothing."""
    if not isinstance(x, DTensor):
        yield from shared_out(part, name, x)
    elif local(x).numel():
        yield Piece(part, name, local(x).reshape(-1), x.numel(), _first(x), shape=tuple(x.shape))


def take(saved: Saved, part: str, name: str, x: Tensor) -> None:
    """Fills what this rank holds of a tensor from a checkpoint.

    Raises:
        UserError: it was not saved, or is smaller there.
    """
    held = local(x)
    if not isinstance(x, DTensor):
        held.copy_(read_whole(saved, part, name, tuple(x.shape)))
    elif held.numel():
        held.copy_(saved.rows(part, name, _first(x), held.numel()).reshape(held.shape))


def _first(x: DTensor) -> int:
    """Place of this rank's first element in the flat tensor."""
    rows = -(-x.shape[0] // world_size())
    return min(rank() * rows, x.shape[0]) * (x.numel() // x.shape[0])
