"""The greatest similarities of each row, in an order that does not depend on how they are found.

Shape suffixes: C rows, G columns, K of them wanted, M cells.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(similarity_CG: Tensor, count: int, after: Tensor | None = None) -> Tensor:
    """Columns of the greatest values of each row, best first, of equal ones the first.

    Args:
        similarity_CG: any.
        count: K, at most G.
        after: cells (row * G + column) that come after all others of the same value; ascending. Shape: (M,).

    Returns:
        Shape: (C, K).
    """
    value_CK, column_CK = similarity_CG.topk(count, dim=1)
    column_CK = _in_order(similarity_CG, column_CK, torch.arange(len(similarity_CG), device=column_CK.device), after)
    # topk takes of equal ones which it likes: where it had a choice, all that it chose from are put in order.
    least_C1 = value_CK[:, -1:]
    chose_C = ((similarity_CG >= least_C1).sum(1) > count) & (least_C1[:, 0] > -torch.inf)
    for row in chose_C.nonzero().flatten().tolist():
        columns = (similarity_CG[row] >= least_C1[row]).nonzero().T
        column_CK[row] = _in_order(similarity_CG, columns, torch.tensor([row], device=columns.device), after)[0, :count]
    return column_CK


def _in_order(similarity_CG: Tensor, column_RK: Tensor, row_R: Tensor, after: Tensor | None) -> Tensor:
    """Some columns of some rows, by descending value, those of `after` last among equals, then by column."""
    column_RK = column_RK.sort(dim=1).values
    if after is not None:
        is_after_RK = torch.isin(row_R[:, None] * similarity_CG.shape[1] + column_RK, after)
        column_RK = column_RK.gather(1, is_after_RK.byte().sort(dim=1, stable=True).indices)
    value_RK = similarity_CG[row_R[:, None], column_RK]
    return column_RK.gather(1, value_RK.sort(dim=1, descending=True, stable=True).indices)
