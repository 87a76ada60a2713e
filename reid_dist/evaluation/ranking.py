"""Retrieval metrics by counting what scores higher than each positive: pure tensors, no I/O, no collectives.

Protocol (CUHK-PEDES as in IRRA, Market-1501 as in fast-reid): identity-aware positives, fp32 similarity,
pessimistic ties (positives after equal negatives), rectangular AP, mINP, queries without a positive left out
and counted.

Shape suffixes: Q queries, G gallery entries, D feature, C queries of a block, S gallery entries of a segment, E pairs
of a query and a gallery entry of its identity, K matches shown, R recall levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.evaluation.counting import BlockCount, SameIdentity
from reid_dist.evaluation.nearest import nearest
from reid_dist.evaluation.similarity import GALLERY_BLOCK, QUERY_BLOCK, block_count, block_rows, each_block, prepare

Metrics = dict[str, float]
METRIC_KEYS = ("R1", "R5", "R10", "mAP", "mINP")
RECALL_LEVELS = 11  # 0, 0.1 ... 1
SEGMENT = 2**17  # gallery entries that are compared at a time: 268 MB of similarities per thread


@dataclass(frozen=True)
class QueryRanks:
    """What each query scored; the rows may be split over ranks and concatenated in any order. On the CPU.

    Attributes:
        first_Q: int64, pessimistic rank (from 1) of the first positive; 0 where the query has none.
        ap_Q: float64, rectangular average precision in [0, 1].
        inp_Q: float64, inverse negative penalty: positives / rank of the last positive.
        positives_Q: int64, positives left after the camera rule; 0 marks a skipped query.
        tied_Q: bool, a positive and a kept negative have exactly the same similarity.
        precision_QR: float64, interpolated precision at recall 0, 0.1 ... 1: the greatest at that recall or above.
    """

    first_Q: Tensor
    ap_Q: Tensor
    inp_Q: Tensor
    positives_Q: Tensor
    tied_Q: Tensor
    precision_QR: Tensor

    def table(self) -> Tensor:
        """All columns as one float64 tensor: exact for the integers, ready for a single collective."""
        single = (self.first_Q, self.ap_Q, self.inp_Q, self.positives_Q, self.tied_Q)
        return torch.cat([torch.stack([each.double() for each in single], dim=1), self.precision_QR], dim=1)

    @classmethod
    def from_table(cls, table: Tensor) -> QueryRanks:
        """The inverse of `table`."""
        first, ap, inp, positives, tied = table[:, :5].unbind(1)
        return cls(first.long(), ap, inp, positives.long(), tied.bool(), table[:, 5:])


@dataclass(frozen=True)
class Retrieval:
    """Queries against a gallery; nothing but tensors.

    Attributes:
        query_QD: [Q, D] any float dtype; the similarity is fp32 whatever it is.
        gallery_GD: [G, D]; drop junk entries before, keep distractors. May lie in a mapped file
            (`torch.from_numpy(numpy.load(..., mmap_mode="c"))`): a segment at a time is read.
        query_pid_Q: [Q] integer identities.
        gallery_pid_G: [G] integer identities.
        query_camid_Q: [Q] cameras. When given, gallery entries of the query's identity AND camera are removed
            for that query (Market-1501 rule); camera -1 is unknown and never removes anything.
        gallery_camid_G: [G] cameras; given exactly when query_camid_Q is.
        normalise: L2-normalise both sides (cosine); False: inner products.
    """

    query_QD: Tensor
    gallery_GD: Tensor
    query_pid_Q: Tensor
    gallery_pid_G: Tensor
    query_camid_Q: Tensor | None = None
    gallery_camid_G: Tensor | None = None
    normalise: bool = True

    def __post_init__(self) -> None:
        """Checks shapes and moves labels to the device of the queries."""
        q, g = self.query_QD.shape[0], self.gallery_GD.shape[0]
        if self.query_QD.ndim != 2 or self.gallery_GD.ndim != 2 or self.query_QD.shape[1] != self.gallery_GD.shape[1]:
            shapes = f"{tuple(self.query_QD.shape)} and {tuple(self.gallery_GD.shape)}"
            raise ValueError(f"features must be [Q, D] and [G, D] with as many columns, got {shapes}")
        if (self.query_camid_Q is None) != (self.gallery_camid_G is None):
            raise ValueError("give both query_camid_Q and gallery_camid_G, or neither")
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
                object.__setattr__(self, name, value.to(self.query_QD.device, torch.int64).contiguous())

    def only(self, part: slice | Tensor) -> Retrieval:
        """The same gallery with some of the queries: a slice, or their positions."""
        camid_Q = None if self.query_camid_Q is None else self.query_camid_Q[part]
        return replace(
            self,
            query_QD=self.query_QD[part],
            query_pid_Q=self.query_pid_Q[part],
            query_camid_Q=camid_Q,
        )

    @property
    def needs_whole_rows(self) -> bool:
        """Whether `adjusted` must see a query's similarities to the whole gallery at once."""
        return False

    def adjusted(self, similarity_CS: Tensor, rows: slice) -> Tensor:
        """What ranks in place of the similarity; re-ranking gives something else than what it gets.

        Args:
            similarity_CS: fp32, of some queries to a segment of the gallery; may be changed.
            rows: which queries.
        """
        return similarity_CS

    def queries(self) -> Tensor:
        """The queries' features, checked and prepared. Shape: (Q, D)."""
        return prepare(self.query_QD, "query", self.normalise, self.query_QD.device)

    def gallery(self, segment: slice = slice(None)) -> Tensor:
        """Features of a part of the gallery, checked and prepared, where the queries are. Shape: (S, D)."""
        part_SD = self.gallery_GD[segment]
        return prepare(part_SD, "gallery", self.normalise, self.query_QD.device, segment.start or 0)

    def similarity(self) -> Tensor:
        """All that is ranked, for small tasks. Shape: (Q, G)."""
        query_QD, gallery_GD = self.queries(), self.gallery()
        parts = each_block(query_QD, gallery_GD, lambda rows, similarity_CG: self.adjusted(similarity_CG, rows).clone())
        return torch.cat([query_QD.new_zeros(0, len(gallery_GD)), *parts])


def _ranks(block: BlockCount) -> QueryRanks:
    """Once all segments are counted: rank = negatives ahead + own place among the positives."""
    query_E = block.query_E[block.kept_E].cpu()
    count_C = torch.bincount(query_E, minlength=block.queries)
    end_C = count_C.cumsum(0)
    most = int(block.ahead_P.max()) + 1 if len(query_E) else 1
    ahead_E = (query_E * most + block.ahead_P).sort().values % most  # ascending within each query
    place_E = torch.arange(1, len(query_E) + 1) - (end_C - count_C)[query_E]
    rank_E = ahead_E + place_E
    precision_E = place_E.double() / rank_E.double()
    # index_add_ adds one by one, so that a query's sum does not depend on the others of its block.
    sum_C = torch.zeros(block.queries, dtype=torch.float64).index_add_(0, query_E, precision_E)
    has_C = count_C > 0
    first_C, last_C = torch.zeros_like(count_C), torch.ones_like(count_C)
    first_C[has_C], last_C[has_C] = rank_E[(end_C - count_C)[has_C]], rank_E[end_C[has_C] - 1]
    tied_C = torch.zeros(block.queries, dtype=torch.bool)
    tied_C[query_E[block.tied_P]] = True
    precision_CR = _interpolated(query_E, place_E, precision_E, count_C)
    return QueryRanks(first_C, sum_C / count_C.clamp_min(1), count_C / last_C.double(), count_C, tied_C, precision_CR)


def _interpolated(query_E: Tensor, place_E: Tensor, precision_E: Tensor, count_C: Tensor) -> Tensor:
    """Greatest precision at each level of recall or above; zeros without positives. Shape: (C, R)."""
    precision_CP = torch.zeros(len(count_C), max(1, int(count_C.max())) if len(count_C) else 1, dtype=torch.float64)
    precision_CP[query_E, place_E - 1] = precision_E
    best_CP = precision_CP.flip(1).cummax(1).values.flip(1)
    tenths_R = torch.arange(RECALL_LEVELS)
    least_CR = -(-tenths_R * count_C[:, None] // (RECALL_LEVELS - 1))  # positives that the level takes, rounded up
    return best_CP.gather(1, (least_CR - 1).clamp_min(0))


def _uncounted(task: Retrieval, blocks: Iterable[int]) -> dict[int, BlockCount]:
    same, counts = SameIdentity(task.gallery_pid_G, task.gallery_camid_G), {}
    for block in blocks:
        rows = block_rows(block, len(task.query_QD))
        camid_C = None if task.query_camid_Q is None else task.query_camid_Q[rows]
        counts[block] = BlockCount(rows.stop - rows.start, *same.pairs(task.query_pid_Q[rows], camid_C))
    return counts


_Actions = Sequence[Callable[[BlockCount, Tensor, slice], None]]


def rank_queries(task: Retrieval, *, segment: int = SEGMENT, blocks: Iterable[int] | None = None) -> QueryRanks:
    """Scores queries; see `rank_metrics` for the rules.

    A gallery of one segment is multiplied once. A larger one is passed through twice, first for the similarity of the
    positives, then to count what is ahead of them; memory is that of one segment.

    Args:
        task: queries and gallery.
        segment: gallery entries in memory at a time, rounded up to whole blocks; no bit of the result depends on it.
        blocks: which blocks of 512 queries (`similarity.block_rows`), in ascending order; none: all.

    Raises:
        UserError: nan or inf features (naming side and row), or an empty gallery.
        ValueError: a segment of nothing.
    """
    size = len(task.gallery_GD)
    if size == 0:
        raise UserError("evaluation: the gallery is empty; check the roles and the split of the shard set")
    if segment < 1:
        raise ValueError(f"segment must be >= 1, got {segment}")
    query_QD, queries = task.queries(), len(task.query_QD)
    chosen = list(range(block_count(queries)) if blocks is None else blocks)
    counts = _uncounted(task, chosen)
    width = size if task.needs_whole_rows else -(-segment // GALLERY_BLOCK) * GALLERY_BLOCK
    segments = [slice(start, min(start + width, size)) for start in range(0, size, width)]
    find, count = BlockCount.find, BlockCount.count
    for actions in [[find, count]] if len(segments) == 1 else [[find], [count]]:
        for part in segments:
            gallery_SD = task.gallery(part)

            def work(rows: slice, similarity_CS: Tensor, part: slice = part, actions: _Actions = actions) -> None:
                similarity_CS = task.adjusted(similarity_CS, rows)
                for act in actions:
                    act(counts[rows.start // QUERY_BLOCK], similarity_CS, part)

            touched = chosen if count in actions else [block for block in chosen if counts[block].occurs_in(part)]
            each_block(query_QD, gallery_SD, work, touched)
    tables = [_ranks(counts[block]).table() for block in chosen]
    return QueryRanks.from_table(torch.cat([torch.zeros(0, 5 + RECALL_LEVELS, dtype=torch.float64), *tables]))


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
    segment: int = SEGMENT,
) -> Metrics:
    """Retrieval metrics; the arguments are those of `Retrieval` and `rank_queries`.

    Returns:
        See `summarise`. CMC over galleries smaller than k is what it must be: rank <= k.

    Raises:
        UserError: nan or inf features (naming side and row), an empty gallery, no query with a positive.

    Source: reference/evaluation.md sections 1-3 and 5; mINP from Ye et al., "Deep Learning for Person
    Re-identification: A Survey and Outlook", equation 10.
    """
    sides = (query_QD, gallery_GD, query_pid_Q, gallery_pid_G, query_camid_Q, gallery_camid_G)
    return summarise(rank_queries(Retrieval(*sides, normalise), segment=segment))


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


def top_matches(task: Retrieval, k: int) -> tuple[Tensor, Tensor]:
    """The first k gallery entries per query in the very order that the metrics count.

    Returns:
        index_QK int64 and score_QK fp32. Where fewer than k entries remain after the camera rule: -1, -inf.
    """
    size = len(task.gallery_GD)
    same = SameIdentity(task.gallery_pid_G, task.gallery_camid_G)

    def first(rows: slice, similarity_CG: Tensor) -> tuple[Tensor, Tensor]:
        similarity_CG = task.adjusted(similarity_CG, rows)
        camid_C = None if task.query_camid_Q is None else task.query_camid_Q[rows]
        query_E, entry_E, kept_E = same.pairs(task.query_pid_Q[rows], camid_C)
        similarity_CG[query_E[~kept_E], entry_E[~kept_E]] = -torch.inf
        is_positive_E = query_E[kept_E] * size + entry_E[kept_E]
        found_CK = nearest(similarity_CG, min(k, size), after=is_positive_E)  # pessimistic: after equal negatives
        score_CK = similarity_CG.gather(1, found_CK)
        padding = (0, max(0, k - size))
        found_CK = nn.functional.pad(found_CK.masked_fill(score_CK == -torch.inf, -1), padding, value=-1)
        return found_CK, nn.functional.pad(score_CK, padding, value=-torch.inf)

    parts = each_block(task.queries(), task.gallery(), first)
    empty = torch.zeros(0, k, device=task.query_QD.device)
    return torch.cat([empty.long(), *(found for found, _ in parts)]), torch.cat([empty, *(score for _, score in parts)])
