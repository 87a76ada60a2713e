"""Which rank the others wait for, from the time that each spends on its own work; nothing is synchronised for it.

A step takes all ranks the same time, since they wait for each other; what differs is how much of it is waiting. Own
work is here what lies between the end of a step and the next one's first backward (data, transfer, forward), less the
time in this package's collectives; on a GPU both are measured on its stream. Not seen is a rank that is slow in
backward or optimizer alone, and under ZeRO 3 and FSDP2, whose forwards wait in the engine, one that is slow in anything
but its data.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reid_dist.distributed import Moment, note_waits, rank, world_size

# What few steps say of a rank is noise, and so is less than a millisecond.
_STEPS = 6
_SECONDS = 0.001
# Standard errors of the difference. A step that hiccups, however long, moves mean and error alike, by 1.
_ERRORS = 4.0


@dataclass(frozen=True)
class _Work:
    """Steps of a rank, the sum of their own work in seconds, and of its squares."""

    steps: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / self.steps

    @property
    def error(self) -> float:
        """Squared, of the mean."""
        return max(0.0, self.squares / self.steps - self.mean**2) / (self.steps - 1)


class OwnWork:
    """Measures this rank's own work and finds the slow ones; one for each stage, on every rank.

    Called by the trainer: `start` right before the loop, and at the end of each turn behind all else in it (log, save,
    agreement to stop); `reached` right before each `engine.backward`, under ZeRO 3 and FSDP2 right before the first
    forward (the first of a step counts; more are free); `close` behind the loop. By the log, every `log_every` steps:
    the numbers of `report` go into the all-reduce of its means, and what comes back goes into `slow`.

    Args:
        device: that trains.
        slow_ratio: a rank is slow whose speed is below so many of the others' median; 0: none is.
    """

    def __init__(self, device: torch.device, slow_ratio: float) -> None:
        self._device, self._ratio = device, slow_ratio
        self._on = slow_ratio > 0 and world_size() > 1
        self._started: Moment | None = None
        self._step: tuple[Moment, Moment, list[tuple[Moment, Moment]]] | None = None
        self._seconds: list[float] = []
        self._warm = False
        self._before: set[int] = set()

    def start(self) -> None:
        """A step begins: the wait for its data counts already."""
        if not self._on:
            return
        self._settle()
        self._started = Moment(self._device)
        self._waits: list[tuple[Moment, Moment]] = []
        note_waits(self._waits)

    def reached(self) -> None:
        """This rank's own work is done, and what follows may wait for others."""
        if self._started is not None:
            self._step = (self._started, Moment(self._device), self._waits)
            self._started = None
            note_waits(None)

    def report(self) -> Tensor:
        """What the ranks tell each other: steps, seconds and squares in this rank's place, and zeros elsewhere.

        Returns:
            float64 on the device. Shape: (3 x world_size,); (0,) where nothing is measured.
        """
        if not self._on:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        self._settle()
        told = torch.zeros(world_size(), 3, dtype=torch.float64)
        if len(self._seconds) >= _STEPS:
            squares = math.fsum(x * x for x in self._seconds)
            told[rank()] = torch.tensor([len(self._seconds), math.fsum(self._seconds), squares])
            self._seconds = []
        return told.flatten().to(self._device)

    def slow(self, means: list[float]) -> str:
        """Names the ranks that were slow in the last two reports; empty where there are none. The same on all ranks.

        Args:
            means: over ranks, of `report`.
        """
        told = [x * world_size() for x in means]
        works = [_Work(*told[place : place + 3]) for place in range(0, len(told), 3)]
        if not works or not all(work.steps for work in works):
            return ""  # too few steps: they count with the next
        now = {owner: others for owner in range(len(works)) if (others := self._is_slow(owner, works)) is not None}
        lasting, self._before = now.keys() & self._before, set(now)
        return ", ".join(
            f"rank {owner} is slow ({works[owner].mean:.3f} s of own work a step, the others {now[owner]:.3f} s)"
            for owner in sorted(lasting)
        )

    def close(self) -> None:
        """The stage is over; nothing is measured any more."""
        if self._started is not None:
            self._started = None
            note_waits(None)

    def _is_slow(self, owner: int, works: list[_Work]) -> float | None:
        """The others' median, where the rank is certainly slower."""
        others = sorted((work for place, work in enumerate(works) if place != owner), key=lambda work: work.mean)
        median, own = others[len(others) // 2], works[owner]
        excess = own.mean - median.mean
        certain = excess > max(_SECONDS, _ERRORS * math.sqrt(own.error + median.error))
        return median.mean if certain and median.mean < self._ratio * own.mean else None

    def _settle(self) -> None:
        """Takes the time of the step that has been measured; by now its work is done, on a GPU too."""
        if self._step is None:
            return
        started, reached, waits = self._step
        self._step = None
        if self._warm:  # the first step of a stage compiles, fills caches and opens files
            self._seconds.append(reached.seconds_since(started) - sum(b.seconds_since(a) for a, b in waits))
        self._warm = True
