"""The greatest similarities of each row, in an order that does not depend on how they are found.

Shape suffixes: C rows, G columns, K of them wanted.
"""

from __future__ import annotations

from torch import Tensor


def nearest(similarity_CG: Tensor, count: int) -> Tensor:
    """Columns of the greatest values of each row, best first, of equal ones the first. Shape: (C, G) -> (C, K)."""
    value_CK, column_CK = similarity_CG.topk(count, dim=1)
    # topk takes and orders equal ones as it likes. Those taken are put in order; where it had a choice, all are sorted.
    column_CK, order_CK = column_CK.sort(dim=1)
    order_CK = value_CK.gather(1, order_CK).sort(dim=1, descending=True, stable=True).indices
    column_CK = column_CK.gather(1, order_CK)
    chose_C = (similarity_CG >= value_CK.amin(1, keepdim=True)).sum(1) > count
    if chose_C.any():
        column_CK[chose_C] = similarity_CG[chose_C].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return column_CK
