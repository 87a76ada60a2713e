"""Ranks of a measurement: processes that join a group, measure together, and leave one row."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from reid_dist import distributed
from reid_dist.errors import UserError

_Case = TypeVar("_Case")


def measure_on_ranks(
    what: str, ranks: int, threads: int, measure: Callable[[_Case], dict[str, Any]], case: _Case
) -> dict[str, Any]:
    """Starts ranks, gloo processes on the CPU or one for each GPU where there are enough; returns rank 0's row.

    Args:
        what: is measured, for the error.
        ranks: processes.
        threads: of each.
        measure: called on each rank of the group; of a module, so that it can be sent.
        case: what it is called with.

    Raises:
        UserError: a rank failed, with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="reid_dist-benchmark-") as folder:
        arguments = (ranks, threads, measure, case, distributed.free_port(), folder)
        # A fork needs no imports, but a process that CUDA was used in cannot be forked.
        method = "spawn" if torch.cuda.is_available() else "fork"
        try:
            start_processes(_rank_main, arguments, nprocs=ranks, start_method=method)  # type: ignore[no-untyped-call]
        except (ProcessExitedException, ProcessRaisedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"{what} benchmark on {ranks} ranks failed: {last}") from error
        row: dict[str, Any] = json.loads(Path(folder, "row.json").read_text())
        return row


def _rank_main(
    rank: int,
    ranks: int,
    threads: int,
    measure: Callable[[_Case], dict[str, Any]],
    case: _Case,
    port: int,
    folder: str,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.device_count() < ranks:
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(threads)
    distributed.initialize(distributed.local_device(), timeout_s=300)
    try:
        row = measure(case)
        if rank == 0:
            Path(folder, "row.json").write_text(json.dumps(row))
    finally:
        distributed.shutdown()
