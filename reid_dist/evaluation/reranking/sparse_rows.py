"""Rows of numbers of which nearly all are zero, on any device.

Shape suffixes: R rows, E entries that are not zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SparseRows(NamedTuple):
    """Rows that are zero nearly everywhere: of row r the entries start_R1[r] to start_R1[r + 1]."""

    start_R1: Tensor
    column_E: Tensor
    value_E: Tensor


def starts(row_E: Tensor, rows: int) -> Tensor:
    """Where the entries of each row begin, from the ascending rows of the entries. Shape: (R + 1,)."""
    return torch.searchsorted(row_E, torch.arange(rows + 1, device=row_E.device))


def row_of(sparse: SparseRows) -> Tensor:
    """The row of each entry. Shape: (E,)."""
    rows = torch.arange(len(sparse.start_R1) - 1, device=sparse.start_R1.device)
    return rows.repeat_interleave(sparse.start_R1.diff())


def take(sparse: SparseRows, row_R: Tensor) -> SparseRows:
    """Some rows, in the order asked for."""
    count_R = sparse.start_R1.diff()[row_R]
    start_R1 = torch.cat([count_R.new_zeros(1), count_R.cumsum(0)])
    shift_R = sparse.start_R1[row_R] - start_R1[:-1]
    entry_E = torch.arange(int(start_R1[-1]), device=row_R.device) + shift_R.repeat_interleave(count_R)
    return SparseRows(start_R1, sparse.column_E[entry_E], sparse.value_E[entry_E])


def transposed(sparse: SparseRows, columns: int) -> SparseRows:
    """Rows by what were the columns."""
    column_E, order_E = sparse.column_E.sort(stable=True)
    return SparseRows(starts(column_E, columns), row_of(sparse)[order_E], sparse.value_E[order_E])


def sums(cell_E: Tensor, value_E: Tensor, size: int) -> Tensor:
    """Adds values up by cell, in an order that is always the same. Shape: (size,)."""
    zeros = torch.zeros(size, device=value_E.device)
    if value_E.is_cuda:  # where index_add_ adds as it comes; this one sorts
        return zeros.index_put_((cell_E,), value_E, accumulate=True)
    return zeros.index_add_(0, cell_E, value_E)
