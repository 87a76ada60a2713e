"""Similarities of queries and gallery in blocks of one fixed shape: no bit depends on how the work is shared out.

Every product has 512 queries, counted from the first query of the task, and 4,096 gallery entries; the last block of
either is padded with zeros. On the CPU each product runs on one thread, several of them at once. Threads, ranks and the
memory at hand therefore decide only who computes a block.

Shape suffixes: N rows, Q queries, G gallery entries, C queries of a block, D feature.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from reid_dist.errors import UserError

QUERY_BLOCK = 512
GALLERY_BLOCK = 4096
WORK_BYTES = 2**30  # similarities that threads hold at once; one block of queries is always held whole
_PREPARED_ROWS = 8192  # fp64 rows at a time

Result = TypeVar("Result")


def prepare(feature_ND: Tensor, side: str, normalise: bool, device: torch.device, first: int = 0) -> Tensor:
    """Checked features in fp32, L2-normalised in fp64 if wanted.

    Args:
        feature_ND: any float dtype; may lie in a mapped file, of which only these rows are read.
        side: query or gallery, for the error.
        normalise: to length 1.
        device: of the result.
        first: number of the first row, for the error.

    Raises:
        UserError: a row holds nan or inf.
    """
    out_ND = torch.empty(feature_ND.shape, dtype=torch.float32, device=device)
    for start in range(0, len(feature_ND), _PREPARED_ROWS):
        part_ND = feature_ND[start : start + _PREPARED_ROWS].to(device).float().double()
        broken_N = ~part_ND.isfinite().all(dim=1)
        if broken_N.any():
            row = first + start + int(broken_N.nonzero()[0])
            raise UserError(
                f"evaluation: {side} feature row {row} holds nan or inf; the model diverged or overflowed: "
                "lower optimizer.lr or use precision fp32"
            )
        if normalise:
            part_ND = part_ND / part_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
        out_ND[start : start + len(part_ND)] = part_ND
    return out_ND


def block_count(queries: int) -> int:
    """Blocks that some queries fill."""
    return -(-queries // QUERY_BLOCK)


def block_rows(block: int, queries: int) -> slice:
    """The queries of a block."""
    return slice(block * QUERY_BLOCK, min((block + 1) * QUERY_BLOCK, queries))


def each_block(
    query_QD: Tensor,
    gallery_GD: Tensor,
    work: Callable[[slice, Tensor], Result],
    blocks: Iterable[int] | None = None,
) -> list[Result]:
    """Does something with the similarities of each block of queries.

    Args:
        query_QD: prepared.
        gallery_GD: prepared, on the same device.
        work: gets which queries and their fp32 similarity to the gallery, [C, G], which it may change and must not
            keep. On the CPU several blocks are worked on at once, each in a thread of its own.
        blocks: which; none: all.

    Returns:
        What `work` returned, in the order of the blocks.
    """
    chosen = range(block_count(len(query_QD))) if blocks is None else list(blocks)
    products = _Products(query_QD, gallery_GD)

    def do(block: int) -> Result:
        rows = block_rows(block, len(query_QD))
        return work(rows, products.of(rows))

    with _exact_fp32():
        return [do(block) for block in chosen] if query_QD.is_cuda else _in_threads(do, chosen, products.bytes)


class _Products:
    """Products of blocks, in memory that each thread keeps for its next block."""

    def __init__(self, query_QD: Tensor, gallery_GD: Tensor) -> None:
        self.query_QD, self.gallery_GD = query_QD, gallery_GD
        self.width = -(-len(gallery_GD) // GALLERY_BLOCK) * GALLERY_BLOCK
        whole = len(gallery_GD) // GALLERY_BLOCK * GALLERY_BLOCK
        self.parts = list(torch.split(gallery_GD[:whole], GALLERY_BLOCK)) if whole else []
        if whole < len(gallery_GD):
            self.parts.append(_padded(gallery_GD[whole:], GALLERY_BLOCK))
        self.bytes = QUERY_BLOCK * self.width * 4
        self.own = threading.local()

    def of(self, rows: slice) -> Tensor:
        """fp32 similarity of some queries to the gallery. Shape: (C, G)."""
        if not hasattr(self.own, "buffer"):
            self.own.buffer = self.query_QD.new_empty(QUERY_BLOCK, self.width)
        query_CD = _padded(self.query_QD[rows], QUERY_BLOCK)
        for part, out in zip(self.parts, torch.split(self.own.buffer, GALLERY_BLOCK, dim=1), strict=True):
            torch.mm(query_CD, part.T, out=out)
        buffer: Tensor = self.own.buffer
        return buffer[: rows.stop - rows.start, : len(self.gallery_GD)]


def _padded(feature_ND: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(feature_ND, (0, 0, 0, rows - len(feature_ND)))


def _in_threads(do: Callable[[int], Result], blocks: Sequence[int], bytes_each: int) -> list[Result]:
    """One-threaded work in as many threads as torch uses here, fewer where memory would not do."""
    threads = torch.get_num_threads()
    workers = max(1, min(threads, WORK_BYTES // max(1, bytes_each), len(blocks)))
    torch.set_num_threads(1)
    try:
        if workers == 1:  # no threads: a process that is forked later could hang in a product of its own
            return [do(block) for block in blocks]
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(do, blocks))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """fp32 products in fp32, whatever the caller allows GPUs elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
