"""What scores no less than each positive of a query, counted without a sort of the gallery.

Shape suffixes: G gallery entries, C queries of a block, S gallery entries of a segment, E pairs of a query and a
gallery entry of its identity, P pairs of a query and a positive, M most positives of a query.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_MANY = 64  # positives of one query from which sorting its similarities beats counting for each of them


class SameIdentity:
    """Finds the gallery entries of an identity without a pass over the gallery: sort by pid once, then slice.

    Args:
        pid_G: identities.
        camid_G: cameras; None: no camera rule.
    """

    def __init__(self, pid_G: Tensor, camid_G: Tensor | None) -> None:
        self.pid_G, self.order_G = pid_G.sort(stable=True)
        self.camid_G = camid_G

    def pairs(self, pid_C: Tensor, camid_C: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of a query and a gallery entry of its identity, in the order of the queries.

        Returns:
            query_E, entry_E, and kept_E: which are positives, the others being removed by the camera rule.
        """
        start_C = torch.searchsorted(self.pid_G, pid_C)
        count_C = torch.searchsorted(self.pid_G, pid_C, right=True) - start_C
        query_E = torch.arange(len(pid_C), device=pid_C.device).repeat_interleave(count_C)
        place_E = torch.arange(len(query_E), device=pid_C.device) - (count_C.cumsum(0) - count_C)[query_E]
        entry_E = self.order_G[start_C[query_E] + place_E]
        if camid_C is None or self.camid_G is None:
            return query_E, entry_E, torch.ones_like(entry_E, dtype=torch.bool)
        camid_E = camid_C[query_E]
        return query_E, entry_E, (camid_E < 0) | (camid_E != self.camid_G[entry_E])


class BlockCount:
    """One block of queries while it is counted, segment by segment, what ranks ahead of their positives.

    Attributes:
        queries: C.
        ahead_P, tied_P: of each positive, on the CPU: negatives counted that are no less similar, and whether one is
            exactly as similar.
    """

    def __init__(self, queries: int, query_E: Tensor, entry_E: Tensor, kept_E: Tensor) -> None:
        """See `SameIdentity.pairs`."""
        self.queries, self.query_E, self.entry_E, self.kept_E = queries, query_E, entry_E, kept_E
        self.similarity_E = torch.zeros(len(query_E), device=query_E.device)
        positives = int(kept_E.sum())
        self.ahead_P = torch.zeros(positives, dtype=torch.int64)
        self.tied_P = torch.zeros(positives, dtype=torch.bool)

    def occurs_in(self, segment: slice) -> bool:
        """Whether an entry of some query's identity lies in the segment."""
        return bool(self._inside(segment).any())

    def find(self, similarity_CS: Tensor, segment: slice) -> None:
        """Notes the similarity of the positives in a segment."""
        inside_E = self._inside(segment)
        cells = self.query_E[inside_E], self.entry_E[inside_E] - segment.start
        self.similarity_E[inside_E] = similarity_CS[cells]

    def count(self, similarity_CS: Tensor, segment: slice) -> None:
        """Counts the negatives of a segment that are no less similar than each positive. Spoils the similarity."""
        inside_E = self._inside(segment)
        similarity_CS[self.query_E[inside_E], self.entry_E[inside_E] - segment.start] = -torch.inf
        ahead_P, tied_P = _not_below(similarity_CS, self.query_E[self.kept_E], self.similarity_E[self.kept_E])
        self.ahead_P += ahead_P
        self.tied_P |= tied_P

    def _inside(self, segment: slice) -> Tensor:
        inside_E: Tensor = (self.entry_E >= segment.start) & (self.entry_E < segment.stop)
        return inside_E


def _not_below(similarity_CS: Tensor, query_P: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """For each value, how many entries of its query's row are no less, and whether one equals it. On the CPU.

    Args:
        similarity_CS: any.
        query_P: ascending.
        value_P: finite.
    """
    count_C = torch.bincount(query_P, minlength=len(similarity_CS))
    if similarity_CS.is_cuda:
        return by_sorting_rows(similarity_CS, count_C, value_P)
    return by_passing_through(similarity_CS, count_C, value_P)


def by_sorting_rows(similarity_CS: Tensor, count_C: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """All rows at once, which GPUs do fast; see `_not_below`."""
    ordered_CS = similarity_CS.sort(dim=1).values
    values_CM = nn.utils.rnn.pad_sequence(list(torch.split(value_P, count_C.tolist())), batch_first=True)
    slots_CM = torch.arange(values_CM.shape[1], device=count_C.device) < count_C[:, None]
    below_P = torch.searchsorted(ordered_CS, values_CM)[slots_CM]
    not_above_P = torch.searchsorted(ordered_CS, values_CM, right=True)[slots_CM]
    return (similarity_CS.shape[1] - below_P).cpu(), (not_above_P > below_P).cpu()


def by_passing_through(similarity_CS: Tensor, count_C: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row; numpy counts one in the processor's cache ten times as fast as torch. See `_not_below`."""
    ahead_P, tied_P = np.zeros(len(value_P), np.int64), np.zeros(len(value_P), np.bool_)
    start = 0
    for row_S, stop in zip(similarity_CS.numpy(), count_C.cumsum(0).tolist(), strict=True):
        values = value_P[start:stop].numpy()
        if len(values) > _MANY:
            ordered_S = np.sort(row_S)
            below = np.searchsorted(ordered_S, values)
            ahead_P[start:stop] = len(row_S) - below
            tied_P[start:stop] = np.searchsorted(ordered_S, values, side="right") > below
        else:
            for place, value in enumerate(values, start):
                ahead_P[place] = np.count_nonzero(row_S >= value)
                tied_P[place] = (row_S == value).any()
        start = stop
    return torch.from_numpy(ahead_P), torch.from_numpy(tied_P)
