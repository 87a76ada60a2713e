"""Whole batches from worker processes, in order."""

import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from reid_dist.errors import UserError

# Tasks that each worker has in advance.
PREFETCH = 2

# Keeps the queues of running loaders out of the garbage collector's hands: it would close those of a loader that an
# error's traceback had held before the loader can tell its workers to end, and torch waits five seconds for each.
_running: set[Any] = set()

_Made = TypeVar("_Made", covariant=True)


def from_workers(
    worker: "Dataset[_Made]", tasks: Iterable[Any], workers: int, pin_memory: bool, remedy: str
) -> "Iterator[_Made]":
    """What `worker[task]` gives for each task, made in `workers` processes that get the tasks in turn.

    Args:
        worker: copied into each process.
        tasks: taken from it as the workers become free.
        workers: at least 1.
        pin_memory: page-locked tensors.
        remedy: what to do when a process was killed, which is mostly for want of memory.

    Raises:
        UserError: a process ended.
    """
    loader: DataLoader[_Made] = DataLoader(
        worker,
        batch_size=None,  # a worker makes whole micro-batches
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # Its own generator: torch would otherwise draw the workers' seed from the global one, and the model's
        # random numbers would depend on the number of loaders started.
        generator=torch.Generator(),
        worker_init_fn=_restore_handler,
    )
    batches = iter(loader)
    _running.add(batches)
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"data.workers: a process that reads training samples ended ({' '.join(str(error).split())}); the machine "
            f"may be out of memory: {remedy}"
        ) from error
    finally:
        _running.discard(batches)


def _restore_handler(_: int) -> None:
    """Gives SIGTERM the handler back that this process was forked with, if any.

    Torch has just put its own in place, with which a signal to the whole process group, as schedulers send it, ends the
    workers while their parent still trains its last step.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _unchanged(made: Any) -> Any:
    return made
