"""TextReID's re-ranking: neighbours that query and gallery entry share add to their similarity (methods.md 3.7).

Han et al. 2021, "cross-modal k-reciprocal re-ranking", as published since commit c4df7c9 of 9 December 2021: in
spite of the name without a test of reciprocity, query expansion or local averages.

Shape suffixes: Q queries, G gallery entries, K neighbours of each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reid_dist.evaluation.ranking import CHUNK_ELEMENTS, Retrieval

_EMPTY = torch.zeros(0, 0, dtype=torch.int64)


@dataclass(frozen=True)
class RerankedRetrieval(Retrieval):
    """A retrieval whose similarity is S'(q, g) = S(q, g) + weight * |N_q & N_g| / |N_q | N_g|.

    N_q are the K gallery entries nearest to the query, N_g those nearest to the gallery entry, itself among them. Of
    equally near ones those that come first are taken. Scored as any retrieval: `rank_queries`, `top_matches`.

    Attributes:
        neighbour_GK: N_g; `rerank` finds them.
        weight: of the Jaccard index.
    """

    neighbour_GK: Tensor = _EMPTY
    weight: float = 0.05

    def similarity(self) -> Tensor:
        """fp32 S' of prepared features. Shape: (Q, G)."""
        similarity_QG = super().similarity()
        shared_QG = self._shared(nearest(similarity_QG, self.neighbour_GK.shape[1])).double()
        jaccard_QG = shared_QG / (2 * self.neighbour_GK.shape[1] - shared_QG)
        return (similarity_QG.double() + self.weight * jaccard_QG).float()

    def _shared(self, neighbour_QK: Tensor) -> Tensor:
        """Size of N_q & N_g, without a G x G matrix. Shape: (Q, K) -> (Q, G)."""
        gallery, count = self.neighbour_GK.shape
        is_near_QG = torch.zeros(len(neighbour_QK), gallery, dtype=torch.bool, device=neighbour_QK.device)
        is_near_QG.scatter_(1, neighbour_QK, True)
        shared_QG = torch.zeros(len(neighbour_QK), gallery, dtype=torch.int64, device=neighbour_QK.device)
        for place in range(count):
            shared_QG += is_near_QG[:, self.neighbour_GK[:, place]]
        return shared_QG


def rerank(
    retrieval: Retrieval, neighbours: int = 5, weight: float = 0.05, *, normalise: bool = True, chunk: int = 512
) -> RerankedRetrieval:
    """Re-ranks captions against images, or images against captions: neighbours of the gallery are of its own modality.

    Args:
        retrieval: queries and gallery; without cameras, for the published rule knows none.
        neighbours: K; of a smaller gallery, all.
        weight: of the Jaccard index.
        normalise: as the ranking that follows.
        chunk: gallery entries whose neighbours are sought at a time; no bit of the result depends on it.

    Raises:
        ValueError: less than one neighbour, or cameras.
        UserError: features with nan or inf.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be >= 1, got {neighbours}")
    if retrieval.query_camid_Q is not None:
        raise ValueError("re-ranking is of captions and images; this retrieval has cameras")
    gallery_GD = retrieval.prepared(normalise).gallery_GD
    count = min(neighbours, len(gallery_GD))
    rows = max(1, min(chunk, CHUNK_ELEMENTS // max(1, len(gallery_GD))))
    parts = [nearest((part_CD @ gallery_GD.T).float(), count) for part_CD in torch.split(gallery_GD, rows)]
    told = {field.name: getattr(retrieval, field.name) for field in fields(Retrieval)}
    return RerankedRetrieval(**told, neighbour_GK=torch.cat(parts), weight=weight)


def nearest(similarity_QG: Tensor, count: int) -> Tensor:
    """Columns of the greatest values of each row, the first of equal ones first. Shape: (Q, G) -> (Q, count)."""
    return similarity_QG.sort(dim=1, descending=True, stable=True).indices[:, :count]
