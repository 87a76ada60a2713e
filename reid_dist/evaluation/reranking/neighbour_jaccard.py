"""TextReID's re-ranking: neighbours that query and gallery entry share add to their similarity (methods.md 3.7).

Han et al. 2021, "cross-modal k-reciprocal re-ranking", as published since commit c4df7c9 of 9 December 2021: in
spite of the name without a test of reciprocity, query expansion or local averages.

Shape suffixes: G gallery entries, C queries of a block, K neighbours of each, E cells that are not zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reid_dist.evaluation.nearest import nearest
from reid_dist.evaluation.ranking import Retrieval
from reid_dist.evaluation.reranking.sparse_rows import SparseRows, row_of, starts, take
from reid_dist.evaluation.sharing import over_ranks
from reid_dist.evaluation.similarity import each_block

_NOTHING = SparseRows(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


@dataclass(frozen=True)
class NeighbourJaccardRetrieval(Retrieval):
    """A retrieval whose similarity is S'(q, g) = S(q, g) + weight * |N_q & N_g| / |N_q | N_g|.

    N_q are the K gallery entries nearest to the query, N_g those nearest to the gallery entry, itself among them. Of
    equally near ones those that come first are taken. Scored as any retrieval: `rank_queries`, `top_matches`.

    Attributes:
        neighbours: K.
        weight: of the Jaccard index.
        near_to: for each gallery entry, those g whose N_g it is in; `neighbour_jaccard` finds them.
    """

    neighbours: int = 5
    weight: float = 0.05
    near_to: SparseRows = _NOTHING

    @property
    def needs_whole_rows(self) -> bool:
        """True: a query's neighbours may be anywhere in the gallery."""
        return True

    def adjusted(self, similarity_CS: Tensor, rows: slice) -> Tensor:
        """fp32 S' of some queries. Shape: (C, G)."""
        neighbour_CK = nearest(similarity_CS, self.neighbours)
        found = take(self.near_to, neighbour_CK.flatten())  # a gallery entry once for each neighbour that both have
        size = similarity_CS.shape[1]
        cell_E = row_of(found) // self.neighbours * size + found.column_E
        cell_E, shared_E = torch.unique(cell_E, return_counts=True)
        jaccard_E = shared_E.double() / (2 * self.neighbours - shared_E)
        cells = cell_E // size, cell_E % size
        similarity_CS[cells] = (similarity_CS[cells].double() + self.weight * jaccard_E).float()
        return similarity_CS


def neighbour_jaccard(retrieval: Retrieval, neighbours: int = 5, weight: float = 0.05) -> NeighbourJaccardRetrieval:
    """Re-ranks by shared neighbours in the gallery, whose entries are compared with their own kind.

    Published for captions and images, either way; between images it is the same rule. Cameras do not matter here: the
    published rule knows none, and the ranking that follows obeys them. A collective: the ranks share the work.

    Args:
        retrieval: queries and gallery.
        neighbours: K; of a smaller gallery, all.
        weight: of the Jaccard index.

    Raises:
        ValueError: less than one neighbour.
        UserError: features with nan or inf.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be >= 1, got {neighbours}")
    gallery_GD = retrieval.gallery()
    count = min(neighbours, len(gallery_GD))

    def near(blocks: range) -> Tensor:
        parts = each_block(gallery_GD, gallery_GD, lambda rows, similarity_CG: nearest(similarity_CG, count), blocks)
        return torch.cat([gallery_GD.new_zeros(0, count).double(), *(part.double() for part in parts)])

    near_GK = over_ranks(len(gallery_GD), near, gallery_GD.device).long().to(gallery_GD.device)
    told = {field.name: getattr(retrieval, field.name) for field in fields(Retrieval)}
    return NeighbourJaccardRetrieval(**told, neighbours=count, weight=weight, near_to=_inverse(near_GK))


def _inverse(near_GK: Tensor) -> SparseRows:
    """For each entry the rows that name it."""
    row_E = near_GK.flatten()
    order_E = row_E.sort(stable=True).indices
    ones_E = torch.ones(len(row_E), device=row_E.device)
    return SparseRows(starts(row_E[order_E], len(near_GK)), order_E // near_GK.shape[1], ones_E)
