"""In which order streams read their tars, and where each of them stands.

A stream is one reading process of one rank. The tars of a lane (all sets, or one set where sets have weights) are
visited in passes: a pass deals each of them to one stream, in an order of its own, and a stream mixes the samples of
its share in a buffer that is empty again when the pass ends. All of it is a function of the plan, so that a position
is a few numbers: how many samples the stream has taken in this pass, and how many each finished tar held.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

IntArray = npt.NDArray[np.int64]

# Last words of the keys, so that no two uses share random numbers; see also sampler.py and transforms.py.
_ORDER, _BUFFER, _REMAINING = 0x53484152, 0x4255464C, 0x52454D41
# Tars that one stream draws before its buffer is emptied, when they are drawn with replacement.
_ROUND = 100
_MOST_DRAWN = 1 << 24
# Draws that are made at once when a buffer is found again.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class StreamPlan:
    """What decides the order.

    Attributes:
        tars: number of tars in each lane.
        seed: not negative.
        world_size: number of ranks.
        workers: streams per rank, at least 1.
        shuffle_buffer: samples that a stream holds and mixes, at least 1.
        resampled: tars are drawn with replacement instead of dealt.
    """

    tars: tuple[int, ...]
    seed: int
    world_size: int = 1
    workers: int = 1
    shuffle_buffer: int = 1000
    resampled: bool = False

    @property
    def streams(self) -> int:
        """Number of streams over all ranks."""
        return self.world_size * self.workers

    def slot(self, rank: int, worker: int) -> int:
        """Number of a stream. Ranks first, as webdataset's `split_by_node` and `split_by_worker` deal."""
        return rank + self.world_size * worker

    def share(self, lane: int, number: int, slot: int) -> list[int]:
        """The tars of a lane that a stream visits in a pass, in order.

        Over all slots these are all tars of the lane, each once; `resampled`, each slot draws its own.

        Args:
            lane: position in `tars`.
            number: of the pass, not negative.
            slot: see `slot`.
        """
        count = self.tars[lane]
        if self.resampled:
            drawn = max(_ROUND, -(-count // self.streams))
            raw = _generator(self.seed, lane, number, slot, _ORDER).random_raw(drawn)
            return [int(each) for each in raw % np.uint64(count)]
        # Dealt from another slot in each pass: the first ones would always get the tars that are left over.
        order = _order(self.seed, lane, number, count)[(slot + number) % self.streams :: self.streams]
        return [int(each) for each in order]

    def mixed(self, lane: int, number: int, tars: Sequence[int]) -> list[int]:
        """What remains of a lane in an order for pass `number`, the same whatever order it comes in."""
        raw = _generator(self.seed, lane, number, _REMAINING).random_raw(len(tars))
        ordered = sorted(tars)
        return [ordered[place] for place in np.argsort(raw, kind="stable")]

    def draws(self, lane: int, number: int, slot: int, skip: int = 0) -> np.random.PCG64:
        """Where the buffer's random numbers of a pass come from, the first `skip` left out."""
        generator = _generator(self.seed, lane, number, slot, _BUFFER)
        return generator.advance(skip) if skip else generator

    def visit(self, number: int, slot: int, place: int) -> int:
        """A number for the visit of a tar that seeds augmentation: the pass, unless one pass draws a tar twice."""
        return (number * self.streams + slot) * _MOST_DRAWN + place if self.resampled else number


class LanePosition(BaseModel):
    """Where a stream stands in a lane.

    Attributes:
        number: of the pass.
        taken: samples taken out of the buffer in this pass.
        counts: samples of each tar of the share that was read to its end, in order.
        share: tars of this pass when they are not those of the plan: what was left at another number of streams.
        total: samples taken since the run began.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int = Field(0, ge=0)
    taken: int = Field(0, ge=0)
    counts: list[int] = []
    share: list[int] | None = None
    total: int = Field(0, ge=0)

    def follow(self, news: dict[str, Any]) -> None:
        """Take in what `PairStream.news` tells of a lane."""
        if news["number"] != self.number:
            self.counts, self.share = [], None
        self.number, self.taken, self.total = news["number"], news["taken"], news["total"]
        self.counts += news["counts"]

    def read(self, plan: StreamPlan, share: Sequence[int]) -> int:
        """Samples read in this pass: those taken and those in the buffer."""
        if not self.taken:
            return 0
        read = self.taken + plan.shuffle_buffer
        return min(read, sum(self.counts)) if len(self.counts) == len(share) else read

    def buffer(self, plan: StreamPlan, lane: int, slot: int, share: Sequence[int]) -> IntArray:
        """The buffer's content as numbers of samples within the pass, in the buffer's order. Shape: (held,)."""
        if not self.taken:
            return np.empty(0, dtype=np.int64)
        size = plan.shuffle_buffer
        whole = len(self.counts) == len(share)
        total = sum(self.counts) if whole else self.taken + size
        replaced = min(self.taken, max(0, total - size))
        rest = self._replaced(plan, lane, slot, replaced)[: min(size, total)].tolist()
        for value in plan.draws(lane, self.number, slot, replaced).random_raw(self.taken - replaced).tolist():
            place = value % len(rest)
            rest[place] = rest[-1]
            rest.pop()
        return np.array(rest, dtype=np.int64)

    def _replaced(self, plan: StreamPlan, lane: int, slot: int, replaced: int) -> IntArray:
        """The full buffer after so many samples took the place of others. Shape: (shuffle_buffer,).

        A place holds the last sample that was put there, so the draws are gone through from the last one back until
        each place was met: a few times the buffer's size, however long the pass.
        """
        size = plan.shuffle_buffer
        held, stop = np.full(size, -1, dtype=np.int64), replaced
        while stop and (held < 0).any():
            start = max(0, stop - _CHUNK)
            places = plan.draws(lane, self.number, slot, start).random_raw(stop - start) % np.uint64(size)
            last = np.full(size, -1, dtype=np.int64)
            # numpy's assignment keeps the last one where a place is named several times.
            last[places.astype(np.int64)] = size + np.arange(start, stop)
            held, stop = np.where(held < 0, last, held), start
        return np.where(held < 0, np.arange(size), held)


@functools.lru_cache(maxsize=4)
def _order(seed: int, lane: int, number: int, count: int) -> IntArray:
    return np.argsort(_generator(seed, lane, number, _ORDER).random_raw(count), kind="stable")


def _generator(*key: int) -> np.random.PCG64:
    """Raw 64-bit draws, which numpy keeps the same in all versions."""
    return np.random.PCG64(np.random.SeedSequence(key))
