"""Process group, rank helpers and the collectives that training and evaluation use.

Contract of every loss in this project: the training loss is the MEAN over ranks of the loss that each rank returns.
A rank computes its own rows against features gathered from all ranks; `all_gather_with_grad` sends every gradient
back to the rank that owns the row, so the averaged parameter gradient is the gradient of the global-batch loss.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def environment_rank() -> int:
    """Rank of this process as its launcher tells it (0 when started by hand); needs no process group."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def environment_world_size() -> int:
    """Number of processes as the launcher tells it (1 when started by hand); needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_single_process_environment() -> None:
    """Fills in what a launcher would have set, so that `python launch/train.py` is a world of one."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())


def initialize(device: torch.device, timeout_s: float = 600.0) -> None:
    """Joins the process group: NCCL for CUDA devices, gloo for the CPU. Does nothing when already joined."""
    if dist.is_initialized():
        return
    set_single_process_environment()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Rank in the process group (0 without one)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Size of the process group (1 without one)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device() -> torch.device:
    """This process's device: its own GPU where there are any (and DS_ACCELERATOR is not `cpu`), else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone, as gloo and NCCL put it."""
    text = str(error)
    return any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    )


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def all_gather(x: Tensor) -> Tensor:
    """Concatenates the ranks' tensors of equal shape along dim 0, without gradient.

    Args:
        x: Shape: (B, ...).

    Returns:
        Shape: (world_size * B, ...), in rank order, the same on every rank.
    """
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def all_gather_ragged(x: Tensor) -> list[Tensor]:
    """The ranks' tensors, which may differ in their first dimension, in rank order; without gradient."""
    if world_size() == 1:
        return [x.detach()]
    counts = all_gather(torch.tensor([x.shape[0]], device=x.device)).tolist()
    longest = max(1, *counts)  # at least one row: no rank may have any
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    rows = all_gather(padded).chunk(world_size())
    return [part[:count] for part, count in zip(rows, counts, strict=True)]


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks whose backward sums each row's gradients from all ranks at the row's owner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        # gloo has no reduce_scatter; features are small (G x D), so the all-reduce costs little more.
        dist.all_reduce(total)
        rows = total.shape[0] // world_size()
        return total[rank() * rows : (rank() + 1) * rows]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """As `all_gather`, differentiable: backward is the sum over ranks of the gradients of this rank's rows.

    Args:
        x: Shape: (B, ...), the same shape on every rank.

    Returns:
        Shape: (world_size * B, ...), in rank order.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor of equal shape over ranks, without gradient, in float64 so that no rank count rounds it."""
    total = x.detach().to(torch.float64, copy=True)
    if world_size() > 1:
        dist.all_reduce(total)
        total /= world_size()
    return total


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value on every rank (pickled between the trusted ranks of one job)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank (pickled between the trusted ranks of one job)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
