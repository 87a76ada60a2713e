"""Which of several sets each unit of the global order is from: mixed, or one set for a whole step.

All of it is a pure function of the place in the order, so that any step is known without the steps before it.

Legend: U units of a step, S sets.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np

from reid_dist.data.units import IntArray
from reid_dist.errors import UserError

Mixing = Literal["mixed", "alternating", "sequential"]

# Products of unit counts and numerators stay below 2**63 for 10**12 units.
FINEST_SHARE = 1_000_000


class Schedule(Protocol):
    """What a plan needs of the order of the sets."""

    def taken(self, number: int, step: int) -> int:
        """How many units of a set the steps before `step` take."""

    def owners(self, step: int) -> IntArray:
        """The set of each unit of a step. Shape: (U,)."""

    def most(self) -> list[int]:
        """The most units of each set that a step can take. Length: S."""

    def seam(self, number: int, position: int) -> tuple[int, int]:
        """Where the step that takes a unit of a set begins and ends: units before it, and from it on."""


def build_schedule(
    mixing: Mixing, weights: Sequence[float], units: int, steps: int = 0, groups: Sequence[int] = ()
) -> Schedule:
    """The order of the sets of a run.

    Args:
        mixing: "mixed": every step holds all sets; "alternating": each step is of one set, and which one follows the
            weights evenly; "sequential": all steps of one set, then those of the next.
        weights: of each set, above 0; they need not sum to 1. Length: S.
        units: U.
        steps: of the whole run; only "sequential" needs them.
        groups: see `Mix`; only for "mixed".

    Raises:
        UserError: "sequential" and too few steps for one of the sets.
        ValueError: "sequential" without steps.
    """
    if mixing == "mixed":
        return Mix(weights, units, groups)
    return Turns(Mix(weights, 1).counts if mixing == "alternating" else _Blocks(weights, steps).counts, units)


class Mix:
    """All sets in every step: the whole numbers nearest to the shares, spread evenly.

    Set 0 is told from the rest by rounding its share of all units so far, set 1 from the rest of that rest, and so on:
    exact in the long run, never further off than half a unit for each set, and known for any step without the steps
    before it. Neighbouring units are of different sets, so micro-batches and ranks see the mix too.

    Sets may form groups: then groups are told apart first, and the sets of each within its share, so that the counts
    of a group do not depend on how many sets it has.

    Args:
        weights: of each set, above 0; they need not sum to 1. Shares are taken as fractions with denominators of up
            to a million.
        units: U.
        groups: a number for each set, equal for sets of one group; empty: all are one group.
    """

    def __init__(self, weights: Sequence[float], units: int, groups: Sequence[int] = ()) -> None:
        self._units = units
        exact = [Fraction(str(weight)) for weight in weights]
        names = list(groups) or [0] * len(exact)
        members = [[s for s, of in enumerate(names) if of == name] for name in dict.fromkeys(names)]
        self._outer = _Shares([sum((exact[s] for s in group), Fraction()) for group in members])
        self._inner = [_Shares([exact[s] for s in group]) for group in members]
        # Where each set stands when the sets are listed group by group.
        in_groups = [s for group in members for s in group]
        self._places = sorted(range(len(in_groups)), key=in_groups.__getitem__)

    def counts(self, units: IntArray) -> list[IntArray]:
        """How many of the first `units` units are from each set. Any shape; length: S."""
        split = zip(self._inner, self._outer.counts(units), strict=True)
        found = [count for shares, of_group in split for count in shares.counts(of_group)]
        return [found[place] for place in self._places]

    def taken(self, number: int, step: int) -> int:
        """See `Schedule`."""
        return int(self.counts(np.array([step * self._units]))[number][0])

    def owners(self, step: int) -> IntArray:
        """See `Schedule`."""
        unit = np.arange(step * self._units, (step + 1) * self._units + 1)
        of_set: IntArray = np.argmax([np.diff(count) for count in self.counts(unit)], axis=0).astype(np.int64)
        return of_set

    def most(self) -> list[int]:
        """See `Schedule`."""
        split = zip(self._inner, self._outer.most(self._units), strict=True)
        found = [most for shares, of_group in split for most in shares.most(of_group)]
        return [found[place] for place in self._places]

    def seam(self, number: int, position: int) -> tuple[int, int]:
        """See `Schedule`."""
        beyond = 1
        while self.taken(number, beyond) <= position:
            beyond *= 2
        step = bisect.bisect_right(range(beyond), position, key=lambda each: self.taken(number, each))
        return position - self.taken(number, step - 1), self.taken(number, step) - position


class Turns:
    """Every step is of one set.

    Args:
        counts: how many of the first steps are of each set; takes and gives arrays of any shape, length: S.
        units: U.
    """

    def __init__(self, counts: Callable[[IntArray], list[IntArray]], units: int) -> None:
        self._counts = counts
        self._units = units

    def taken(self, number: int, step: int) -> int:
        """See `Schedule`."""
        return self._units * int(self._counts(np.array([step]))[number][0])

    def owners(self, step: int) -> IntArray:
        """See `Schedule`."""
        before, after = np.stack(self._counts(np.array([step, step + 1])), axis=1)
        return np.full(self._units, np.argmax(after - before), dtype=np.int64)

    def most(self) -> list[int]:
        """See `Schedule`."""
        return [self._units] * len(self._counts(np.array([0])))

    def seam(self, number: int, position: int) -> tuple[int, int]:
        """See `Schedule`."""
        before = position % self._units
        return before, self._units - before


class _Shares:
    """Counts of units of some sets, nearest to their shares; see `Mix`."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        shares = [weight / sum(weights[place:]) for place, weight in enumerate(weights)]
        self._shares = [share.limit_denominator(FINEST_SHARE) for share in shares[:-1]]

    def counts(self, units: IntArray) -> list[IntArray]:
        found, rest = [], units
        for share in self._shares:
            of_set = (2 * rest * share.numerator + share.denominator) // (2 * share.denominator)
            found.append(of_set)
            rest = rest - of_set
        return [*found, rest]

    def most(self, units: int) -> list[int]:
        """Of any `units` units in a row."""
        found, rest = [], Fraction(units)
        for share in self._shares:
            found.append(math.ceil(rest * share))
            rest = Fraction(math.ceil(rest * (1 - share)))
        return [*found, int(rest)]


class _Blocks:
    """The steps of a run, one set after the other; a run that goes on stays with the last one."""

    def __init__(self, weights: Sequence[float], steps: int) -> None:
        if steps < 1:
            raise ValueError(f"sequential sets share the steps of a run: at least 1, not {steps}")
        lengths = [int(length) for length in Mix(weights, 1).counts(np.array(steps))]
        if 0 in lengths:
            raise UserError(
                f"data.mixing: sequential: {steps} steps are too few for set {lengths.index(0) + 1} of the mix; "
                f"raise the stage's steps or its share in data.weights"
            )
        self._ends = np.cumsum(lengths)
        self._ends[-1] = np.iinfo(np.int64).max

    def counts(self, steps: IntArray) -> list[IntArray]:
        """How many of the first `steps` steps are of each set. Any shape; length: S."""
        done = [np.minimum(steps, end) for end in self._ends]
        return [after - before for before, after in zip([np.zeros_like(steps), *done[:-1]], done, strict=True)]
