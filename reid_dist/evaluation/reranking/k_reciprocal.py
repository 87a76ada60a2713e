"""k-reciprocal re-ranking (Zhong et al., CVPR 2017) with sparse neighbour sets, for any pair of modalities.

The original fills matrices of N x N, 35 GB for MSMT17. Here only neighbours and their weights are kept, some hundred
numbers a row, and the final distances are made for a few queries at a time.

Shape suffixes: Q queries, G gallery entries, N = Q + G queries and then gallery entries, C rows of a chunk, K nearest
neighbours, H the nearest half of them, E weights that are not zero, D feature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from reid_dist.evaluation.nearest import nearest
from reid_dist.evaluation.ranking import Retrieval
from reid_dist.evaluation.reranking.sparse_rows import SparseRows, row_of, starts, sums, take, transposed
from reid_dist.evaluation.sharing import over_ranks
from reid_dist.evaluation.similarity import each_block

_ROWS = 512  # that are widened or averaged at a time
_PAIRS = 2**15  # whose distances are measured at a time
_EXPAND = 2 / 3  # a candidate's neighbours are taken over if more than so many of them are mine already


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
        square_Q: squared length of each query.
        square_G: likewise of the gallery.
        scale_Q: greatest squared distance of each query.
        place_Q: which of the queries that `weights_of_queries` holds these are.
    """

    weight: float = 0.3
    weights_of_queries: SparseRows = _NOTHING
    gallery_of: SparseRows = _NOTHING
    square_Q: Tensor = _EMPTY
    square_G: Tensor = _EMPTY
    scale_Q: Tensor = _EMPTY
    place_Q: Tensor = _EMPTY

    def only(self, part: slice | Tensor) -> Retrieval:
        """See `Retrieval.only`."""
        plain = super().only(part)
        own = {name: getattr(self, name)[part] for name in ("square_Q", "scale_Q", "place_Q")}
        return replace(plain, **own)

    @property
    def needs_whole_rows(self) -> bool:
        """True: a query weighs neighbours anywhere in the gallery."""
        return True

    def adjusted(self, similarity_CS: Tensor, rows: slice) -> Tensor:
        """-[(1 - weight) d_J + weight D] of some queries, in fp32. Shape: (C, G)."""
        squared_CS = similarity_CS.mul_(-2).add_(self.square_G).add_(self.square_Q[rows, None]).clamp_(min=0)
        out_CS = squared_CS.mul_(-self.weight / self.scale_Q[rows, None]).sub_(1 - self.weight)
        shared_CS = self._shared(rows)
        return out_CS.add_(shared_CS.div_(2 - shared_CS), alpha=1 - self.weight)  # d_J = 1 - shared / (2 - shared)

    def _shared(self, rows: slice) -> Tensor:
        """sum_l min(V_ql, V_gl), over what both weigh. Shape: (C, G)."""
        size = (rows.stop - rows.start, len(self.gallery_GD))
        own = take(self.weights_of_queries, self.place_Q[rows])
        count_E = self.gallery_of.start_R1.diff()[own.column_E]
        met = take(self.gallery_of, own.column_E)
        least = torch.minimum(own.value_E.repeat_interleave(count_E), met.value_E)
        cell = row_of(own).repeat_interleave(count_E) * size[1] + met.column_E
        return sums(cell, least, size[0] * size[1]).view(size)


def k_reciprocal(retrieval: Retrieval, k1: int = 20, k2: int = 6, weight: float = 0.3) -> KReciprocalRetrieval:
    """Re-ranks by the neighbours that queries and gallery entries have in common and are to each other.

    As the original's code (evaluation.md 6.1): squared distances of normalised features, each row over its greatest; of
    each row the k1 nearest besides itself that have it among theirs too, widened by those of the members whose nearest
    half agree with it; weights exp(-distance), averaged over the k2 nearest.

    Args:
        retrieval: queries and gallery; cameras do not matter here, the ranking that follows obeys them.
        k1: neighbours.
        k2: neighbours averaged over, itself among them; 1: none.
        weight: lambda, of the original distance.

    Raises:
        ValueError: numbers that cannot be.
        UserError: features with nan or inf.
    """
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(f"k1 and k2 must be >= 1 and weight from 0 to 1, got {k1}, {k2}, {weight}")
    device, queries = retrieval.query_QD.device, len(retrieval.query_QD)
    feature_ND = torch.cat([retrieval.queries(), retrieval.gallery()])
    square_N = feature_ND.square().sum(1)
    near_NK, scale_N = _neighbours(feature_ND, square_N, max(k1 + 1, k2))
    weights = _weights(feature_ND, near_NK[:, : k1 + 1], scale_N, round(k1 / 2) + 1)
    if k2 > 1:
        weights = _averaged(weights, near_NK[:, :k2])
    rows = torch.arange(len(feature_ND), device=device)
    told = {field.name: getattr(retrieval, field.name) for field in fields(Retrieval)}
    return KReciprocalRetrieval(
        **told,
        weight=weight,
        weights_of_queries=take(weights, rows[:queries]),
        gallery_of=transposed(take(weights, rows[queries:]), len(feature_ND)),
        square_Q=square_N[:queries],
        square_G=square_N[queries:],
        scale_Q=scale_N[:queries],
        place_Q=rows[:queries],
    )


def _neighbours(feature_ND: Tensor, square_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest of each row, itself among them, in order; and its greatest squared distance. Shapes: (N, K), (N,)."""
    count = min(count, len(feature_ND))

    def near(rows: slice, similarity_CN: Tensor) -> tuple[Tensor, Tensor]:
        nearness_CN = similarity_CN.mul_(2).sub_(square_N)  # squared length of the row less the squared distance
        return nearest(nearness_CN, count), square_N[rows] - nearness_CN.amin(1)

    def table(blocks: range) -> Tensor:
        parts = each_block(feature_ND, feature_ND, near, blocks)
        rows = [torch.cat([columns.double(), scale.double()[:, None]], 1) for columns, scale in parts]
        return torch.cat([square_N.new_zeros(0, count + 1).double(), *rows])

    found = over_ranks(len(feature_ND), table, feature_ND.device).to(feature_ND.device)
    return found[:, :count].long(), found[:, count].float().clamp_(min=torch.finfo(torch.float32).tiny)


def _weights(feature_ND: Tensor, near_NK: Tensor, scale_N: Tensor, half: int) -> SparseRows:
    """exp(-distance) of each row's widened k-reciprocal neighbours, of sum 1."""
    is_mutual_NK = _mutual(near_NK)
    near_NH = near_NK[:, :half]
    is_mutual_NH = _mutual(near_NH)
    rows, columns = [], []
    for row_C in torch.split(torch.arange(len(near_NK), device=near_NK.device), _ROWS):
        widened = _widened(near_NK[row_C], is_mutual_NK[row_C], near_NH, is_mutual_NH)
        columns.append(widened[widened >= 0])
        rows.append(row_C.repeat_interleave((widened >= 0).sum(1)))
    row_E, column_E = torch.cat(rows), torch.cat(columns)
    pairs = zip(torch.split(row_E, _PAIRS), torch.split(column_E, _PAIRS), strict=True)
    distance_E = torch.cat([(feature_ND[a] - feature_ND[b]).square().sum(1) for a, b in pairs])
    value_E = (-distance_E / scale_N[row_E]).exp()
    sum_N = sums(row_E, value_E, len(near_NK))
    return SparseRows(starts(row_E, len(near_NK)), column_E, value_E / sum_N[row_E])


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
    for row_CK in torch.split(near_NK, _ROWS):
        taken = take(weights, row_CK.flatten())
        cell_E = (row_of(taken) // count) * size + taken.column_E
        cell_E, place_E = torch.unique(cell_E, return_inverse=True)
        value_E = sums(place_E, taken.value_E / count, len(cell_E))
        parts.append(SparseRows(starts(cell_E // size, len(row_CK)), cell_E % size, value_E))
    counts = torch.cat([part.start_R1.diff() for part in parts])
    start_R1 = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseRows(start_R1, torch.cat([p.column_E for p in parts]), torch.cat([p.value_E for p in parts]))
