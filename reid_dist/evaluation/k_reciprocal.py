"""k-reciprocal re-ranking (Zhong et al., CVPR 2017) with sparse neighbour sets, for any pair of modalities.

The original fills matrices of N x N, 35 GB for MSMT17. Here only neighbours and their weights are kept, some hundred
numbers a row, and the final distances are made for a few queries at a time.

Shape suffixes: Q queries, G gallery entries, N = Q + G queries and then gallery entries, C rows of a chunk, K nearest
neighbours, H the nearest half of them, E weights that are not zero, D feature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from reid_dist.evaluation.ranking import CHUNK_ELEMENTS, Retrieval

_EXPAND = 2 / 3  # a candidate's neighbours are taken over if more than so many of them are mine already


class SparseRows(NamedTuple):
    """Rows that are zero nearly everywhere: of row r the entries start_R1[r] to start_R1[r + 1]."""

    start_R1: Tensor
    column_E: Tensor
    value_E: Tensor


_EMPTY = torch.zeros(0)
_NOTHING = SparseRows(_EMPTY, _EMPTY, _EMPTY)


@dataclass(frozen=True)
class KReciprocalRetrieval(Retrieval):
    """A retrieval whose similarity is -[(1 - weight) d_J + weight D]; `k_reciprocal` makes it.

    d_J is the Jaccard distance of the k-reciprocal neighbours' weights, D the squared Euclidean distance over its
    greatest value for the query. Scored as any retrieval: `rank_queries`, `top_matches`.

    Attributes:
        weight: of the original distance.
        weights_of_queries: of all N, a row for each query.
        gallery_of: for each of the N, the gallery entries that it weighs something for.
        scale_Q: greatest squared distance of each query.
        place_Q: which of the queries that `weights_of_queries` holds these are.
    """

    weight: float = 0.3
    weights_of_queries: SparseRows = _NOTHING
    gallery_of: SparseRows = _NOTHING
    scale_Q: Tensor = _EMPTY
    place_Q: Tensor = _EMPTY

    def only(self, part: slice | Tensor) -> Retrieval:
        """See `Retrieval.only`."""
        plain = super().only(part)
        return replace(plain, scale_Q=self.scale_Q[part], place_Q=self.place_Q[part])  # type: ignore[call-arg]

    def similarity(self) -> Tensor:
        """fp32 similarity of prepared features. Shape: (Q, G)."""
        distance_QG = _squared(self.query_QD, self.gallery_GD) / self.scale_Q[:, None]
        shared_QG = self._shared()
        jaccard_QG = 1 - shared_QG / (2 - shared_QG)
        return -((1 - self.weight) * jaccard_QG + self.weight * distance_QG).float()

    def _shared(self) -> Tensor:
        """sum_l min(V_ql, V_gl), over what both weigh. Shape: (Q, G)."""
        queries, gallery = len(self.query_QD), len(self.gallery_GD)
        own = _take(self.weights_of_queries, self.place_Q)
        query_E = _row_of(own)
        count_E = self.gallery_of.start_R1.diff()[own.column_E]
        met = _take(self.gallery_of, own.column_E)
        least = torch.minimum(own.value_E.repeat_interleave(count_E), met.value_E)
        cell = query_E.repeat_interleave(count_E) * gallery + met.column_E
        return torch.zeros(queries * gallery, device=least.device).index_add_(0, cell, least).view(queries, gallery)


def k_reciprocal(
    retrieval: Retrieval, k1: int = 20, k2: int = 6, weight: float = 0.3, *, normalise: bool = True, chunk: int = 512
) -> KReciprocalRetrieval:
    """Re-ranks by the neighbours that queries and gallery entries have in common and are to each other.

    As the original's code (evaluation.md 6.1): squared distances of normalised features, each row over its greatest; of
    each row the k1 nearest besides itself that have it among theirs too, widened by those of the members whose nearest
    half agree with it; weights exp(-distance), averaged over the k2 nearest.

    Args:
        retrieval: queries and gallery; cameras do not matter here, the ranking that follows obeys them.
        k1: neighbours.
        k2: neighbours averaged over, itself among them; 1: none.
        weight: lambda, of the original distance.
        normalise: as the ranking that follows.
        chunk: rows whose neighbours are sought at a time.

    Raises:
        ValueError: numbers that cannot be.
        UserError: features with nan or inf.
    """
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(f"k1 and k2 must be >= 1 and weight from 0 to 1, got {k1}, {k2}, {weight}")
    prepared = retrieval.prepared(normalise)
    feature_ND = torch.cat([prepared.query_QD, prepared.gallery_GD]).float()
    near_NK, scale_N = _neighbours(feature_ND, max(k1 + 1, k2), chunk)
    weights = _weights(feature_ND, near_NK[:, : k1 + 1], scale_N, round(k1 / 2) + 1, chunk)
    if k2 > 1:
        weights = _averaged(weights, near_NK[:, :k2])
    queries = len(retrieval.query_QD)
    rows = torch.arange(len(feature_ND), device=feature_ND.device)
    told = {field.name: getattr(retrieval, field.name) for field in fields(Retrieval)}
    return KReciprocalRetrieval(
        **told,
        weight=weight,
        weights_of_queries=_take(weights, rows[:queries]),
        gallery_of=_transposed(_take(weights, rows[queries:]), len(feature_ND)),
        scale_Q=scale_N[:queries],
        place_Q=rows[:queries],
    )


def _squared(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Squared Euclidean distances. Shape: (N, M)."""
    distance_NM = a_ND.square().sum(1)[:, None] + b_MD.square().sum(1) - 2 * a_ND @ b_MD.T
    return distance_NM.clamp_(min=0)


def _neighbours(feature_ND: Tensor, count: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The nearest of each row, itself among them, in order; and its greatest squared distance. Shapes: (N, K), (N,)."""
    count = min(count, len(feature_ND))
    near, scale = [], []
    for part_CD in torch.split(feature_ND, max(1, min(chunk, CHUNK_ELEMENTS // len(feature_ND)))):
        distance_CN = _squared(part_CD, feature_ND)
        scale.append(distance_CN.amax(1))
        near.append(distance_CN.topk(count, dim=1, largest=False, sorted=True).indices)
    return torch.cat(near), torch.cat(scale).clamp_(min=torch.finfo(torch.float32).tiny)


def _weights(feature_ND: Tensor, near_NK: Tensor, scale_N: Tensor, half: int, chunk: int) -> SparseRows:
    """exp(-distance) of each row's widened k-reciprocal neighbours, of sum 1."""
    is_mutual_NK = _mutual(near_NK)
    near_NH = near_NK[:, :half]
    is_mutual_NH = _mutual(near_NH)
    rows, columns = [], []
    for row_C in torch.split(torch.arange(len(near_NK), device=near_NK.device), chunk):
        widened = _widened(near_NK[row_C], is_mutual_NK[row_C], near_NH, is_mutual_NH)
        columns.append(widened[widened >= 0])
        rows.append(row_C.repeat_interleave((widened >= 0).sum(1)))
    row_E, column_E = torch.cat(rows), torch.cat(columns)
    pairs = zip(torch.split(row_E, chunk * 64), torch.split(column_E, chunk * 64), strict=True)
    distance_E = torch.cat([(feature_ND[a] - feature_ND[b]).square().sum(1) for a, b in pairs])
    value_E = (-distance_E / scale_N[row_E]).exp()
    sum_N = torch.zeros(len(near_NK), device=value_E.device).index_add_(0, row_E, value_E)
    return SparseRows(_starts(row_E, len(near_NK)), column_E, value_E / sum_N[row_E])


def _mutual(near_NK: Tensor) -> Tensor:
    """Whether a row is among the neighbours of its neighbour. Shape: (N, K)."""
    own_N1 = torch.arange(len(near_NK), device=near_NK.device)[:, None]
    is_mutual_NK = torch.zeros_like(near_NK, dtype=torch.bool)
    for place in range(near_NK.shape[1]):  # without N x K x K at once
        is_mutual_NK[:, place] = (near_NK[near_NK[:, place]] == own_N1).any(1)
    return is_mutual_NK


def _widened(near_CK: Tensor, is_mutual_CK: Tensor, near_NH: Tensor, is_mutual_NH: Tensor) -> Tensor:
    """Neighbours of some rows with those of like-minded neighbours, each once; -1: none. Shape: (C, K + K * H)."""
    mine_CK = near_CK.masked_fill(~is_mutual_CK, -1)
    theirs_CKH = near_NH[near_CK].masked_fill(~is_mutual_NH[near_CK], -2)
    common_CK = (theirs_CKH[..., None] == mine_CK[:, None, None]).any(3).sum(2)
    takes_CK = is_mutual_CK & (common_CK > _EXPAND * (theirs_CKH >= 0).sum(2))
    theirs_CKH = theirs_CKH.masked_fill(~takes_CK[..., None], -1).clamp(min=-1)
    sorted_CE = torch.cat([mine_CK, theirs_CKH.flatten(1)], 1).sort(1).values
    sorted_CE[:, 1:][sorted_CE[:, 1:] == sorted_CE[:, :-1]] = -1  # the shifted side is read before it is written
    return sorted_CE


def _averaged(weights: SparseRows, near_NK: Tensor) -> SparseRows:
    """Each row's mean over the rows of its neighbours."""
    size, count = near_NK.shape
    parts = []
    for row_CK in torch.split(near_NK, max(1, CHUNK_ELEMENTS // (count * 4096))):
        taken = _take(weights, row_CK.flatten())
        cell_E = (_row_of(taken) // count) * size + taken.column_E
        cell_E, place_E = torch.unique(cell_E, return_inverse=True)
        value_E = torch.zeros(len(cell_E), device=cell_E.device).index_add_(0, place_E, taken.value_E / count)
        parts.append(SparseRows(_starts(cell_E // size, len(row_CK)), cell_E % size, value_E))
    counts = torch.cat([part.start_R1.diff() for part in parts])
    start_R1 = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseRows(start_R1, torch.cat([p.column_E for p in parts]), torch.cat([p.value_E for p in parts]))


def _starts(row_E: Tensor, rows: int) -> Tensor:
    """Where the entries of each row begin, from the ascending rows of the entries. Shape: (R + 1,)."""
    return torch.searchsorted(row_E, torch.arange(rows + 1, device=row_E.device))


def _row_of(sparse: SparseRows) -> Tensor:
    """The row of each entry. Shape: (E,)."""
    rows = torch.arange(len(sparse.start_R1) - 1, device=sparse.start_R1.device)
    return rows.repeat_interleave(sparse.start_R1.diff())


def _take(sparse: SparseRows, row_R: Tensor) -> SparseRows:
    """Some rows, in the order asked for."""
    count_R = sparse.start_R1.diff()[row_R]
    start_R1 = torch.cat([count_R.new_zeros(1), count_R.cumsum(0)])
    shift_R = sparse.start_R1[row_R] - start_R1[:-1]
    entry_E = torch.arange(int(start_R1[-1]), device=row_R.device) + shift_R.repeat_interleave(count_R)
    return SparseRows(start_R1, sparse.column_E[entry_E], sparse.value_E[entry_E])


def _transposed(sparse: SparseRows, columns: int) -> SparseRows:
    """Rows by what were the columns."""
    column_E, order_E = sparse.column_E.sort(stable=True)
    return SparseRows(_starts(column_E, columns), _row_of(sparse)[order_E], sparse.value_E[order_E])
