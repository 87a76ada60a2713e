"""Text-to-image and image-to-image retrieval metrics by counting: pure tensors, no I/O, no collectives.

Protocol (CUHK-PEDES as in IRRA, Market-1501 as in fast-reid): identity-aware positives, fp32 similarity,
pessimistic ties (positives after equal negatives), rectangular AP, mINP, queries without a positive left out
and counted.

Shape suffixes: Q queries, G gallery entries, D feature, P most positives of any query, K matches shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from reid_dist.errors import UserError

Metrics = dict[str, float]
METRIC_KEYS = ("R1", "R5", "R10", "mAP", "mINP")
CHUNK_ELEMENTS = 2**25  # caps the rows of a chunk; at ~35 bytes per element a chunk takes at most ~1.2 GB


@dataclass(frozen=True)
class QueryRanks:
    """What each query scored; the rows may be split over ranks and concatenated in any order.

    Attributes:
        first_Q: int64, pessimistic rank (from 1) of the first positive; 0 where the query has none.
        ap_Q: float64, rectangular average precision in [0, 1].
        inp_Q: float64, inverse negative penalty: positives / rank of the last positive.
        positives_Q: int64, positives left after the camera rule; 0 marks a skipped query.
        tied_Q: bool, a positive and a kept negative have exactly the same similarity.
    """

    first_Q: Tensor
    ap_Q: Tensor
    inp_Q: Tensor
    positives_Q: Tensor
    tied_Q: Tensor

    def table(self) -> Tensor:
        """All columns as one float64 tensor [Q, 5]: exact for the integers, ready for a single collective."""
        return torch.stack([getattr(self, field.name).double() for field in fields(self)], dim=1)

    @classmethod
    def from_table(cls, table_Q5: Tensor) -> QueryRanks:
        """The inverse of `table`."""
        first, ap, inp, positives, tied = table_Q5.unbind(1)
        return cls(first.long(), ap, inp, positives.long(), tied.bool())


@dataclass(frozen=True)
class Retrieval:
    """Queries against a gallery; nothing but tensors.

    Attributes:
        query_QD: [Q, D] any float dtype; the similarity is fp32 whatever it is.
        gallery_GD: [G, D]; drop junk entries before, keep distractors.
        query_pid_Q: [Q] integer identities.
        gallery_pid_G: [G] integer identities.
        query_camid_Q: [Q] cameras. When given, gallery entries of the query's identity AND camera are removed
            for that query (Market-1501 rule); camera -1 is unknown and never removes anything.
        gallery_camid_G: [G] cameras; given exactly when query_camid_Q is.
    """

    query_QD: Tensor
    gallery_GD: Tensor
    query_pid_Q: Tensor
    gallery_pid_G: Tensor
    query_camid_Q: Tensor | None = None
    gallery_camid_G: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks shapes and moves everything to the device of the queries."""
        q, g = self.query_QD.shape[0], self.gallery_GD.shape[0]
        if self.query_QD.ndim != 2 or self.gallery_GD.ndim != 2 or self.query_QD.shape[1] != self.gallery_GD.shape[1]:
            shapes = f"{tuple(self.query_QD.shape)} and {tuple(self.gallery_GD.shape)}"
            raise ValueError(f"features must be [Q, D] and [G, D] with as many columns, got {shapes}")
        if (self.query_camid_Q is None) != (self.gallery_camid_G is None):
            raise ValueError("give both query_camid_Q and gallery_camid_G, or neither")
        self._put("gallery_GD", self.gallery_GD.to(self.query_QD.device))
        for name, length in (
            ("query_pid_Q", q),
            ("gallery_pid_G", g),
            ("query_camid_Q", q),
            ("gallery_camid_G", g),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != (length,):
                raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")
            if value is not None:
                self._put(name, value.to(self.query_QD.device, torch.int64).contiguous())

    def _put(self, name: str, value: Tensor) -> None:
        object.__setattr__(self, name, value)

    def only(self, part: slice | Tensor) -> Retrieval:
        """The same gallery with some of the queries: a slice, or their positions."""
        camid_Q = None if self.query_camid_Q is None else self.query_camid_Q[part]
        return replace(
            self,
            query_QD=self.query_QD[part],
            query_pid_Q=self.query_pid_Q[part],
            query_camid_Q=camid_Q,
        )

    def prepared(self, normalise: bool) -> Retrieval:
        """The same with checked, optionally L2-normalised features, rounded to fp32 and stored as fp64.

        Raises:
            UserError: a row holds nan or inf.
        """
        query_QD = _prepared(self.query_QD, "query", normalise)
        return replace(
            self,
            query_QD=query_QD,
            gallery_GD=_prepared(self.gallery_GD, "gallery", normalise),
        )

    def chunks(self, chunk: int) -> Iterator[Retrieval]:
        """At most `chunk` queries at a time, fewer where the similarity matrix would pass CHUNK_ELEMENTS."""
        if chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        rows = max(1, min(chunk, CHUNK_ELEMENTS // max(1, len(self.gallery_GD))))
        for start in range(0, len(self.query_QD), rows):
            yield self.only(slice(start, start + rows))

    def similarity(self) -> Tensor:
        """fp32 similarity [Q, G] of prepared features.

        The products of fp32 numbers are exact in fp64, and so is, to far below half an fp32 step, their sum:
        the rounded result does not depend on the order in which a BLAS adds, hence not on chunk, threads or
        device, and two identical gallery rows tie as they should.
        """
        return (self.query_QD @ self.gallery_GD.T).float()

    def removed(self, gallery_pid: Tensor, gallery_camid: Tensor | None) -> Tensor:
        """Which of some gallery entries, [G] or [Q, P], the camera rule removes for each query."""
        same = self.query_pid_Q[:, None] == gallery_pid
        if self.query_camid_Q is None or gallery_camid is None:
            return torch.zeros_like(same)
        camid_Q1 = self.query_camid_Q[:, None]
        return same & (gallery_camid == camid_Q1) & (camid_Q1 >= 0)


def _prepared(feature_ND: Tensor, side: str, normalise: bool) -> Tensor:
    wide_ND = feature_ND.float().double()
    broken_N = ~wide_ND.isfinite().all(dim=1)
    if broken_N.any():
        row = int(broken_N.nonzero()[0])
        raise UserError(
            f"evaluation: {side} feature row {row} holds nan or inf ({int(broken_N.sum())} such rows); "
            "the model diverged or overflowed: lower optimizer.lr or use precision fp32"
        )
    if normalise:
        wide_ND = wide_ND / wide_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return wide_ND.float().double()


class _PositiveIndex:
    """Finds the gallery rows of an identity without a pass over the gallery: sort by pid once, then slice."""

    def __init__(self, task: Retrieval) -> None:
        self.pid_G, self.order_G = task.gallery_pid_G.sort(stable=True)
        start_Q, count_Q = self._range(task)
        # One width for all chunks: a sum over padding must not depend on which queries share a chunk.
        self.width = max(1, int(count_Q.max())) if len(start_Q) else 1

    def _range(self, task: Retrieval) -> tuple[Tensor, Tensor]:
        start_Q = torch.searchsorted(self.pid_G, task.query_pid_Q)
        return start_Q, torch.searchsorted(self.pid_G, task.query_pid_Q, right=True) - start_Q

    def rows(self, task: Retrieval) -> tuple[Tensor, Tensor]:
        """Gallery rows [Q, P] of the query's pid, and which of them are positives under the camera rule."""
        start_Q, count_Q = self._range(task)
        slot_P = torch.arange(self.width, device=start_Q.device)
        row_QP = self.order_G[(start_Q[:, None] + slot_P).clamp_max(len(self.order_G) - 1)]
        camid_QP = None if task.gallery_camid_G is None else task.gallery_camid_G[row_QP]
        return row_QP, (slot_P < count_Q[:, None]) & ~task.removed(task.gallery_pid_G[row_QP], camid_QP)


def _rank_chunk(task: Retrieval, index: _PositiveIndex) -> QueryRanks:
    """Ranks by counting: rank = kept negatives with similarity >= own + own place among the positives."""
    sim_QG = task.similarity()
    row_QP, valid_QP = index.rows(task)
    # Positives in ascending order; what is removed or padding goes to the end as +inf.
    positive_QP = sim_QG.gather(1, row_QP).masked_fill(~valid_QP, torch.inf).sort(dim=1).values
    # Removed entries share the query's pid, so what is left of the matrix are the negatives.
    sim_QG.masked_fill_(task.query_pid_Q[:, None] == task.gallery_pid_G, -torch.inf)
    beaten_QG = torch.searchsorted(positive_QP, sim_QG, right=True)  # positives that this negative is not below
    tied_Q = (positive_QP.gather(1, (beaten_QG - 1).clamp_min(0)) == sim_QG).any(dim=1)
    histogram_QP1 = beaten_QG.new_zeros(sim_QG.shape[0], index.width + 1)
    histogram_QP1.scatter_add_(1, beaten_QG, torch.ones_like(beaten_QG))
    ahead_QP = histogram_QP1.flip(1).cumsum(1).flip(1)[:, 1:]  # negatives ahead of the i-th weakest positive
    count_Q = valid_QP.sum(dim=1)
    place_QP = count_Q[:, None] - torch.arange(index.width, device=count_Q.device)
    real_QP = place_QP > 0
    rank_QP = (ahead_QP + place_QP).masked_fill(~real_QP, 1)
    precision_QP = (place_QP.double() / rank_QP.double()).masked_fill(~real_QP, 0.0)
    best_Q = rank_QP.gather(1, (count_Q - 1).clamp_min(0)[:, None]).squeeze(1)
    return QueryRanks(
        first_Q=best_Q.masked_fill(count_Q == 0, 0),
        ap_Q=precision_QP.sum(dim=1) / count_Q.clamp_min(1),
        inp_Q=count_Q.double() / rank_QP[:, 0].double(),
        positives_Q=count_Q,
        tied_Q=tied_Q,
    )


def rank_queries(task: Retrieval, *, normalise: bool = True, chunk: int = 512) -> QueryRanks:
    """Scores every query; see `rank_metrics` for the rules.

    Args:
        task: queries and gallery.
        normalise: L2-normalise both sides (cosine). False scores by inner product.
        chunk: queries scored at a time; fewer where chunk x G would exceed 2**25 elements (about 1.2 GB). No
            bit of the result depends on it.

    Raises:
        UserError: nan or inf features (naming side and row), or an empty gallery.
    """
    if len(task.gallery_GD) == 0:
        raise UserError("evaluation: the gallery is empty; check the roles and the split of the shard set")
    task = task.prepared(normalise)
    index = _PositiveIndex(task)
    tables = [_rank_chunk(part, index).table() for part in task.chunks(chunk)]
    empty = torch.zeros(0, 5, dtype=torch.float64, device=task.query_QD.device)
    return QueryRanks.from_table(torch.cat(tables) if tables else empty)


def summarise(ranks: QueryRanks) -> Metrics:
    """Means over the valid queries, in percent; exactly rounded sums, so query order is immaterial.

    Returns:
        R1, R5, R10, mAP, mINP and tied (share of valid queries) in percent; queries and skipped as counts.

    Raises:
        UserError: no query has a positive; zeros would look like a measurement.
    """
    valid_Q = ranks.positives_Q > 0
    total, count = len(valid_Q), int(valid_Q.sum())
    if count == 0:
        raise UserError(
            f"evaluation: none of the {total} queries has a positive in the gallery; "
            "check that query and gallery come from one split and share identities"
        )

    def percent(value_Q: Tensor) -> float:
        return 100.0 * math.fsum(value_Q[valid_Q].double().tolist()) / count

    metrics = {f"R{k}": percent(ranks.first_Q <= k) for k in (1, 5, 10)}
    metrics |= {"mAP": percent(ranks.ap_Q), "mINP": percent(ranks.inp_Q)}
    return metrics | {
        "queries": float(count),
        "skipped": float(total - count),
        "tied": percent(ranks.tied_Q),
    }


def rank_metrics(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_pid_Q: Tensor,
    gallery_pid_G: Tensor,
    query_camid_Q: Tensor | None = None,
    gallery_camid_G: Tensor | None = None,
    *,
    normalise: bool = True,
    chunk: int = 512,
) -> Metrics:
    """Retrieval metrics; the arguments are those of `Retrieval` and `rank_queries`.

    Returns:
        See `summarise`. CMC over galleries smaller than k is what it must be: rank <= k.

    Raises:
        UserError: nan or inf features (naming side and row), an empty gallery, no query with a positive.

    Source: reference/evaluation.md sections 1-3 and 5; mINP from Ye et al., "Deep Learning for Person
    Re-identification: A Survey and Outlook", equation 10.
    """
    task = Retrieval(query_QD, gallery_GD, query_pid_Q, gallery_pid_G, query_camid_Q, gallery_camid_G)
    return summarise(rank_queries(task, normalise=normalise, chunk=chunk))


def t2i_metrics(text_QD: Tensor, image_GD: Tensor, text_pid_Q: Tensor, image_pid_G: Tensor) -> Metrics:
    """Text-to-image: every caption [Q] is a query, every distinct image [G] stands once; no camera rule."""
    return rank_metrics(text_QD, image_GD, text_pid_Q, image_pid_G)


def i2i_metrics(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_pid_Q: Tensor,
    gallery_pid_G: Tensor,
    query_camid_Q: Tensor,
    gallery_camid_G: Tensor,
) -> Metrics:
    """Image-to-image, Market-1501 single query: same identity and camera removed; the caller drops junk."""
    return rank_metrics(query_QD, gallery_GD, query_pid_Q, gallery_pid_G, query_camid_Q, gallery_camid_G)


def top_matches(task: Retrieval, k: int, *, normalise: bool = True, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The first k gallery entries per query in the very order that the metrics count; for a few queries.

    Returns:
        index_QK int64 and score_QK fp32. Where fewer than k entries remain after the camera rule: -1, -inf.
    """
    task = task.prepared(normalise)
    indices, scores = [], []
    for part in task.chunks(chunk):
        sim_QG = part.similarity()
        sim_QG.masked_fill_(part.removed(part.gallery_pid_G, part.gallery_camid_G), -torch.inf)
        same_QG = part.query_pid_Q[:, None] == part.gallery_pid_G
        negatives_first_QG = same_QG.byte().argsort(dim=1, stable=True)  # pessimistic ties after a stable sort
        score_QG, place_QG = sim_QG.gather(1, negatives_first_QG).sort(dim=1, descending=True, stable=True)
        found_QG = negatives_first_QG.gather(1, place_QG).masked_fill(score_QG == -torch.inf, -1)
        short = max(0, k - found_QG.shape[1])
        indices.append(nn.functional.pad(found_QG[:, :k], (0, short), value=-1))
        scores.append(nn.functional.pad(score_QG[:, :k], (0, short), value=-torch.inf))
    return torch.cat(indices), torch.cat(scores)
