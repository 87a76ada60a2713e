"""One stream of pairs: tars of its share, one after the other, mixed in a buffer, from any position on."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from reid_dist.data.stream.plan import LanePosition, StreamPlan
from reid_dist.data.stream.source import Pair, StreamSource, Tar
from reid_dist.errors import UserError

# A stream whose share of so many passes in a row held nothing looks no further.
_MAX_EMPTY_PASSES = 50


class LaneTar(NamedTuple):
    """A tar with its source, and its number within the run."""

    source: StreamSource
    tar: Tar
    number: int


class PairStream:
    """Pairs without end.

    Args:
        plan: of all streams.
        lanes: the tars of each lane.
        weights: share of each lane; they sum to 1.
        slot: which stream this is, see `StreamPlan.slot`.
        positions: where it stands in each lane.
        strict: the first problem is an error.

    Raises:
        UserError: what the buffers held cannot be read again.
    """

    def __init__(
        self,
        plan: StreamPlan,
        lanes: Sequence[Sequence[LaneTar]],
        weights: Sequence[float],
        slot: int,
        positions: Sequence[LanePosition],
        strict: bool = True,
    ) -> None:
        self._weights = list(weights)
        self._lanes = [
            _Lane(plan, number, tars, slot, position, strict)
            for number, (tars, position) in enumerate(zip(lanes, positions, strict=True))
        ]

    @property
    def positions(self) -> list[LanePosition]:
        """Where it stands now, in each lane."""
        return [lane.position for lane in self._lanes]

    def news(self) -> list[dict[str, Any]]:
        """What `LanePosition.follow` needs to know since the last call: not all that a long pass has counted."""
        return [lane.news() for lane in self._lanes]

    def take(self) -> Pair:
        """The next pair, or what is wrong with it.

        Raises:
            UserError: a tar cannot be read, or (strict) a sample.
        """
        if len(self._lanes) == 1:
            return self._lanes[0].take()
        # The lane that is most behind: shares hold in every batch, not only on average.
        due = 1 + sum(lane.position.total for lane in self._lanes)
        behind = [weight * due - lane.position.total for weight, lane in zip(self._weights, self._lanes, strict=True)]
        return self._lanes[behind.index(max(behind))].take()


class _Lane:
    """One lane of one stream, see `stream.plan` for the order."""

    def __init__(
        self,
        plan: StreamPlan,
        lane: int,
        tars: Sequence[LaneTar],
        slot: int,
        position: LanePosition,
        strict: bool,
    ) -> None:
        self._plan = plan
        self._lane = lane
        self._tars = tars
        self._slot = slot
        self._strict = strict
        self.position = position.model_copy(deep=True)
        self._begun = position.taken > 0
        self._buffer: list[Pair] = []
        self._told = 0
        self._open_share()
        if self._begun:
            self._restore()

    def news(self) -> dict[str, Any]:
        """See `PairStream.news`."""
        position, told = self.position, self._told
        self._told = len(position.counts)
        return {
            "number": position.number,
            "taken": position.taken,
            "total": position.total,
            "counts": position.counts[told:],
        }

    def take(self) -> Pair:
        """The next pair out of the buffer."""
        if not self._buffer:
            self._fill()
        place = next(self._draws) % len(self._buffer)
        taken = self._buffer[place]
        new = self._read()
        if new is None:
            self._buffer[place] = self._buffer[-1]
            self._buffer.pop()
        else:
            self._buffer[place] = new
        self.position.taken += 1
        self.position.total += 1
        return taken

    def _open_share(self) -> None:
        """Go to the beginning of the pass that the position names."""
        position = self.position
        own = self._plan.share(self._lane, position.number, self._slot) if position.share is None else position.share
        self._share = own
        self._draws = self._raw_draws()
        self._told = len(position.counts)
        self._place = 0
        self._pairs: Iterator[Pair] | None = None
        self._count = 0

    def _raw_draws(self) -> Iterator[int]:
        generator = self._plan.draws(self._lane, self.position.number, self._slot, self.position.taken)
        while True:
            yield from generator.random_raw(1024).tolist()

    def _fill(self) -> None:
        """Fill the buffer from the next pass with samples."""
        for _ in range(_MAX_EMPTY_PASSES):
            if self._begun:
                self.position = LanePosition(number=self.position.number + 1, total=self.position.total)
                self._open_share()
            self._begun = True
            while len(self._buffer) < self._plan.shuffle_buffer:
                pair = self._read()
                if pair is None:
                    break
                self._buffer.append(pair)
            if self._buffer:
                return
        first = self._tars[self._share[0]] if self._share else self._tars[0]
        raise UserError(
            f"{first.source.describe(first.tar)}: no samples in it, nor in the tars read after it; check data.train"
        )

    def _read(self) -> Pair | None:
        """The next pair of this pass; None at its end."""
        while True:
            if self._pairs is None:
                if self._place == len(self._share):
                    return None
                self._pairs = self._visit(self._place)
            pair = next(self._pairs, None)
            if pair is not None:
                if self._strict and pair.problem:
                    raise UserError(pair.problem)
                self._count += 1
                return pair
            self.position.counts.append(self._count)
            self._pairs, self._count = None, 0
            self._place += 1

    def _visit(self, place: int) -> Iterator[Pair]:
        """The pairs of a tar of the share."""
        source, tar, number = self._tars[self._share[place]]
        return source.pairs(tar, number, self._plan.visit(self.position.number, self._slot, place))

    def _restore(self) -> None:
        """Read again what the buffer held, and go on in the tar that was being read.

        Tars without a sample in the buffer are left alone; of the others no more is read than is needed.
        """
        position, plan = self.position, self._plan
        held = position.buffer(plan, self._lane, self._slot, self._share).tolist()
        places = {sample: place for place, sample in enumerate(held)}
        found: dict[int, Pair] = {}
        read, first = position.read(plan, self._share), 0
        for self._place, count in enumerate(position.counts):
            wanted = [sample for sample in held if first <= sample < first + count]
            if wanted:
                pairs = self._visit(self._place)
                for sample in range(first, max(wanted) + 1):
                    self._keep(pairs, sample, places, found)
            first += count
        self._place = len(position.counts)
        if self._place < len(self._share):
            self._pairs = self._visit(self._place)
            for sample in range(first, read):
                self._keep(self._pairs, sample, places, found)
            self._count = read - first
        self._buffer = [found[place] for place in range(len(held))]

    def _keep(self, pairs: Iterator[Pair], sample: int, places: dict[int, int], found: dict[int, Pair]) -> None:
        pair = next(pairs, None)
        if pair is None:
            source, tar, _ = self._tars[self._share[self._place]]
            raise UserError(
                f"{source.describe(tar)}: holds fewer samples than when the position was saved; restore the tar, "
                f"or start the stage anew"
            )
        if sample in places:
            found[places[sample]] = pair
