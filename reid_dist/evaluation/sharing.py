"""Blocks of queries dealt to the ranks, and what they found put together again; without ranks, all in this process.

Shape suffixes: Q queries, X columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reid_dist.distributed import all_gather_ragged, rank, world_size
from reid_dist.evaluation.similarity import block_count, block_rows


def over_ranks(queries: int, work: Callable[[range], Tensor], device: torch.device) -> Tensor:
    """Rows of all queries, each computed by one rank. A collective: every rank gets the same.

    Args:
        queries: Q.
        work: the rows of some blocks of queries, in their order; float64, which holds indices exactly too.
        device: where collectives take their tensors.

    Returns:
        Shape: (Q, X), on the CPU.
    """
    dealt = [range(part, block_count(queries), world_size()) for part in range(world_size())]
    own = work(dealt[rank()])
    if world_size() == 1:
        return own.cpu()
    parts = [part.cpu() for part in all_gather_ragged(own.to(device))]
    rows_QX = torch.empty(queries, parts[0].shape[1], dtype=own.dtype)
    for blocks, part in zip(dealt, parts, strict=True):
        rows = [block_rows(block, queries) for block in blocks]
        for row, value in zip(rows, torch.split(part, [row.stop - row.start for row in rows]), strict=True):
            rows_QX[row] = value
    return rows_QX
