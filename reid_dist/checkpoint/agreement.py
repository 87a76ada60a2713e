"""What the ranks of a checkpoint do together: what fails on one rank fails with its words on all of them."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from reid_dist.distributed import rank, world_size
from reid_dist.errors import CheckpointError, UserError

_T = TypeVar("_T")
# What a line is enough for.
_EXPECTED = (CheckpointError, UserError, OSError, SafetensorError, MemoryError)


def together(
    action: Callable[[], _T], fail: Callable[[str], Exception] = UserError, group: dist.ProcessGroup | None = None
) -> list[_T]:
    """Runs an action on every rank and returns all values, in rank order. Collective.

    Args:
        action: of this rank.
        fail: makes of the first rank's failure, one line, what is raised on every rank.
        group: that the ranks talk in; None: all.

    Raises:
        Exception: what `fail` makes, on every rank: the action failed on one.
        RuntimeError: another rank has gone.
    """
    value, problem = None, None
    try:
        value = action()
    # Any: whoever leaves now lets the other ranks wait.
    except Exception as found:
        problem = found
    values, problems = zip(*gather((value, None if problem is None else describe(problem)), group), strict=True)
    if problem is not None and not isinstance(problem, _EXPECTED):  # a fault of the program
        traceback.print_exception(problem)
    failed = [words for words in problems if words is not None]
    if failed:
        raise fail(failed[0]) from problem
    return list(values)


def on_rank_0(
    action: Callable[[], _T], fail: Callable[[str], Exception] = UserError, group: dist.ProcessGroup | None = None
) -> _T:
    """Runs an action on rank 0 and gives its value to all, see `together`."""
    found = together(lambda: action() if rank() == 0 else None, fail, group)[0]
    return found  # type: ignore[return-value]


def describe(error: Exception) -> str:
    """One line for what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, _EXPECTED[:-1]) else f"{type(error).__name__}: {error}"


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value on every rank, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_rank_0(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value on rank 0, in rank order; nothing on the others. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []
