"""Process group, rank helpers and the collectives that training and evaluation use.

Contract of every loss in this project: the training loss is the MEAN over ranks of the loss that each rank returns.
A rank computes its own rows against features gathered from all ranks; `all_gather_with_grad` sends every gradient
back to the rank that owns the row, so the averaged parameter gradient is the gradient of the global-batch loss.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reid_dist.errors import DivergenceError, UserError

# Name servers of a cluster may be slow while a job of many hosts starts.
_RESOLVE_S = 5.0


def environment_rank() -> int:
    """Rank of this process as its launcher tells it (0 when started by hand); needs no process group."""
    _adopt_slurm_step()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def environment_world_size() -> int:
    """Number of processes as the launcher tells it (1 when started by hand); needs no process group."""
    _adopt_slurm_step()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _adopt_slurm_step() -> None:
    """Without `RANK`, a task of an `srun` of several gets from SLURM's variables what other launchers set.

    A script of `sbatch` and a single task stay a world of one, whatever the job has allocated.
    """
    step = os.environ
    if "RANK" in step or "SLURM_PROCID" not in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    step.setdefault("WORLD_SIZE", step["SLURM_STEP_NUM_TASKS"])
    step.setdefault("LOCAL_RANK", step["SLURM_LOCALID"])
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", step["SLURM_STEP_TASKS_PER_NODE"])  # such as 2(x3),1
    tasks = [int(count) for count, times in groups for _ in range(int(times or 1))]
    step.setdefault("LOCAL_WORLD_SIZE", str(tasks[int(step["SLURM_NODEID"])]))
    step["RANK"] = step["SLURM_PROCID"]


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_single_process_environment() -> None:
    """Fills in what a launcher would have set, so that `python launch/train.py` is a world of one.

    Raises:
        UserError: one task of several of an `srun`, which do not know where to meet.
    """
    ranks = environment_world_size()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and ranks > 1 and "SLURM_PROCID" in os.environ:
        raise UserError(
            f"{' and '.join(missing)} not set, where the {ranks} tasks of srun meet; before srun: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1) MASTER_PORT=29500'
        )
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())


def initialize(device: torch.device, timeout_s: float = 600.0) -> None:
    """Joins the process group: NCCL for CUDA devices, gloo for the CPU. Does nothing when already joined.

    Raises:
        UserError: the ranks did not meet at MASTER_ADDR and MASTER_PORT.
    """
    if dist.is_initialized():
        return
    set_single_process_environment()
    _check_master_address()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        # A rank that has gone while they met has said why itself.
        if is_lost_peer(error) or not (isinstance(error, dist.DistError) or "Gloo connect" in str(error)):
            raise
        raise UserError(_why_not_met(str(error))) from error
    if backend == "gloo":  # else a rank 0 that ends at once takes the store away from ranks that still connect
        dist.barrier()


def _check_master_address() -> None:
    """Torch would ask for a name that nobody knows until its timeout, and then not say that this was it."""
    address = os.environ["MASTER_ADDR"]
    deadline = time.monotonic() + _RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR={address}: rank {environment_rank()} on {socket.gethostname()} cannot resolve it"
                    f" ({error.strerror}); set it to a name or address of rank 0's host that all hosts know"
                ) from error
            time.sleep(0.5)


def _why_not_met(said: str) -> str:
    """One line for what torch says of ranks that did not find each other."""
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    who = f"rank {environment_rank()} of {environment_world_size()} on {socket.gethostname()}"
    said = said.splitlines()[0]
    if "EADDRINUSE" in said:
        return f"{place}: {who}: another program listens on the port; choose another MASTER_PORT for all ranks"
    if "waiting for clients" in said:
        return f"{place}: {who} waited for the others in vain ({said}); look at their hosts, and for a firewall between"
    if "Gloo connect" in said:
        return (
            f"{place}: {who} met the others there, but cannot reach each of them ({said}); set GLOO_SOCKET_IFNAME to"
            " the network interface between the hosts, and open its ports"
        )
    return (
        f"{place}: {who}: rank 0 does not answer there ({said}); look at its host, whether both values are the same on"
        " all hosts, and for a firewall between"
    )


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
    _adopt_slurm_step()
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank has gone, as gloo and NCCL put it, or led to this error."""
    if error is None:
        return False
    # Not of a UserError: a data server's connection can be reset, too.
    said = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    lost = isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    return lost or is_lost_peer(error.__context__)


class Moment:
    """Now: on the host, or on a GPU when its stream gets here."""

    def __init__(self, device: torch.device) -> None:
        self._host = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_since(self, earlier: "Moment") -> float:
        """Time between two moments; waits until the GPU has got here."""
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


_waits: list[tuple[Moment, Moment]] | None = None


def note_waits(into: list[tuple[Moment, Moment]] | None) -> None:
    """From now on adds to a list when this process entered and left each collective on tensors here; None: no more."""
    global _waits
    _waits = into


@contextlib.contextmanager
def _waiting(device: torch.device) -> Iterator[None]:
    entered = None if _waits is None else Moment(device)
    yield
    if _waits is not None and entered is not None:
        _waits.append((entered, Moment(device)))


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
    with _waiting(x.device):
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


class PackedGather:
    """An all-gather of several tensors as ONE collective, on its way; made by `start_all_gather`."""

    # Any dtype can be viewed at an address that is a multiple of this.
    _ALIGNMENT = 8

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [(x.dtype, x.shape) for x in tensors]
        buffer = torch.cat([piece for x in tensors for piece in self._pieces(x)])
        self._gathered = buffer
        self._work: dist.Work | None = None
        if world_size() > 1:
            self._gathered = buffer.new_empty(world_size() * buffer.numel())
            self._work = dist.all_gather_into_tensor(self._gathered, buffer, async_op=True)
            self._sent = buffer  # must outlive the collective

    def wait(self) -> list[Tensor]:
        """The gathered tensors, (world_size * B, ...) each, in rank order. On a GPU only its stream waits."""
        if self._work is not None:
            with _waiting(self._gathered.device):
                self._work.wait()
            self._work = None
            del self._sent
        rank_WX = self._gathered.view(world_size(), -1)
        found, start = [], 0
        for dtype, shape in self._kinds:
            length = shape.numel() * dtype.itemsize
            block = rank_WX[:, start : start + length].view(dtype)
            found.append(block.reshape(world_size() * shape[0], *shape[1:]))
            start += length + -length % self._ALIGNMENT
        return found

    def _pieces(self, x: Tensor) -> list[Tensor]:
        x_X = x.detach().contiguous().view(-1).view(torch.uint8)
        return [x_X, x_X.new_zeros(-x_X.numel() % self._ALIGNMENT)]


def start_all_gather(tensors: Sequence[Tensor]) -> PackedGather:
    """Starts to gather tensors of any dtypes in one collective, without gradient.

    Every rank must start its collectives in the same order; they may be waited for in any.

    Args:
        tensors: on one device; each of the same shape (B, ...) on every rank. They are copied at once.
    """
    return PackedGather(tensors)


def all_to_all(x: Tensor) -> Tensor:
    """Sends block w of dim 0 to rank w; without gradient.

    Args:
        x: equal blocks, one for each rank, in rank order. Shape: (world_size * B, ...).

    Returns:
        The blocks that the ranks sent here, in rank order. Shape: (world_size * B, ...).
    """
    if world_size() == 1:
        return x.detach()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    with _waiting(x.device):
        dist.all_to_all_single(received, x.detach().contiguous())
    return received


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor of equal shape over ranks, without gradient; integers wrap."""
    total = x.detach().clone()
    if world_size() > 1:
        with _waiting(x.device):
            dist.all_reduce(total)
    return total


def check_equal_on_ranks(value: Tensor, what: str) -> None:
    """Compares a number over ranks and names those that differ from the majority. Collective; waits for the device.

    Args:
        value: int64, as a digest. Shape: ().
        what: what the number stands for, the sentence's subject.

    Raises:
        DivergenceError: on every rank alike.
    """
    values = all_gather(value.view(1)).tolist()
    if len(set(values)) > 1:
        who = who_differs(values)
        raise DivergenceError(f"{what} is not the same on all ranks: {who}; continue from the last checkpoint")


def who_differs(values: Sequence[int]) -> str:
    """Which ranks hold another value than most, in words; one value for each rank, not all equal."""
    common = max(values, key=values.count)
    if 2 * values.count(common) > len(values):
        others = [str(owner) for owner, found in enumerate(values) if found != common]
        return f"rank{'s' if len(others) > 1 else ''} {', '.join(others)} of {len(values)} diverged from the others"
    return "two ranks differ" if len(values) == 2 else f"no majority of the {len(values)} ranks agrees"


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
