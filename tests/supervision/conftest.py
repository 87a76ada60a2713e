"""Forked ranks whose exit codes and last words count."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist import distributed


class Ranks:
    """Forked processes, in a process group or, a single one, without.

    Attributes:
        processes: in rank order.
        folder: has what each wrote to stderr.
    """

    def __init__(self, folder: Path, count: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.folder = folder
        context = multiprocessing.get_context("fork")
        port = distributed.free_port()
        targets = [(folder, rank, count, port, function, args) for rank in range(count)]
        self.processes: list[BaseProcess] = [context.Process(target=_main, args=target) for target in targets]
        for process in self.processes:
            process.start()

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for(self, name: str) -> None:
        """Waits until the ranks have made this file."""
        deadline = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def codes(self, seconds: float, *ranks: int) -> list[int | None]:
        """The exit codes, all or of some ranks; None for one that runs longer than this."""
        deadline = time.monotonic() + seconds
        wanted = [self.processes[rank] for rank in ranks] or self.processes
        for process in wanted:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in wanted]

    def said(self, rank: int | None = None) -> str:
        files = sorted(self.folder.glob("stderr*")) if rank is None else [self.folder / f"stderr{rank}"]
        return "".join(file.read_text() for file in files)


def _main(folder: Path, rank: int, count: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    said = open(folder / f"stderr{rank}", "w")  # noqa: SIM115 (until the process ends)
    os.dup2(said.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        if count > 1:
            distributed.initialize(torch.device("cpu"), timeout_s=60)
        code = function(folder, rank, *args) or 0
    except BaseException:
        traceback.print_exc(file=said)
        said.flush()
    finally:
        os._exit(code)  # no handlers of the parent that was forked


@contextlib.contextmanager
def started(folder: Path, count: int, function: Callable[..., Any], *args: Any) -> Iterator[Ranks]:
    """Forked ranks that run `function(folder, rank, *args)`, which gives the exit code; killed in the end."""
    ranks = Ranks(folder, count, function, args)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`start(count, function, *args)`, see `started`."""
    with contextlib.ExitStack() as stack:
        yield lambda count, function, *args: stack.enter_context(started(tmp_path, count, function, *args))
