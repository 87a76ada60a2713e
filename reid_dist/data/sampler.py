"""Plans: which samples make up each optimizer step, as pure functions of (seed, step).

A plan is one global order, the same on every rank and at every world size; a rank takes its slice of a step, so the
position in training is (seed, epoch, step) and nothing has to be stored or gathered.

A set is gone through in passes (epochs) without end: all its units in a seeded order, then all of them in another one.
Steps take units from this stream one after the other, so nothing is dropped, and a step that meets the end of a pass
goes on with the beginning of the next. The units are samples, or identities with K images each.

Legend: N units of a set, U units of a step, K samples of a unit, G = U * K global batch, W world size, A accumulation,
B = G / (W * A) rows of one rank's micro-batch, R spare samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reid_dist.data.mixing import Mixing, Schedule, build_schedule
from reid_dist.data.units import IntArray, RawArray, Units, places_in_runs
from reid_dist.errors import UserError

# Third word of the key, so that plans never share random numbers with augmentations (transforms.sample_rng).
_PLAN_STREAM = 0x504C414E
# Spare samples of each row, where a plan is asked for them: even if half of a set is bad, 16 in a row are rare.
SPARES = 16


@dataclass(frozen=True)
class Step:
    """One global batch.

    Attributes:
        sample_G: sample numbers; the K rows of an identity are adjacent. Shape: (G,).
        epoch_G: the pass that each row belongs to. Shape: (G,).
        spare_GR: what replaces a row whose sample cannot be read, best first; it may hold the sample itself. R is 0
            unless the plan was asked for it. Shape: (G, R).
    """

    sample_G: IntArray
    epoch_G: IntArray
    spare_GR: IntArray


class Passes:
    """The endless stream of a set's units, pass after pass.

    Args:
        units: the set.
        random: raw random numbers of a pass: (epoch, how many to skip, how many).
        seam: of a pass's first unit, see `mixing.Schedule`.
        most: the most units that a step takes of this set.
    """

    def __init__(
        self,
        units: Units,
        random: Callable[[int, int, int], RawArray],
        seam: Callable[[int], tuple[int, int]],
        most: int,
    ) -> None:
        self.units = units
        self._random = random
        self._seam = seam
        self._most = most
        self._kept: dict[int, tuple[IntArray, RawArray]] = {}

    def take(self, start: int, stop: int, spares: int) -> tuple[IntArray, IntArray, IntArray]:
        """Units [start, stop) of the stream: samples (U, K), passes (U,) and spares (U, K, R)."""
        images, count = self.units.images, len(self.units)
        parts = [(np.empty((0, images), np.int64), np.empty(0, np.int64), np.empty((0, images, spares), np.int64))]
        while start < stop:
            epoch, place = divmod(start, count)
            length = min(stop - start, count - place)
            parts.append(self._slice(epoch, np.arange(place, place + length), spares))
            start += length
        sample, passes, spare = (np.concatenate(part) for part in zip(*parts, strict=True))
        return sample, passes, spare

    def _slice(self, epoch: int, place_U: IntArray, spares: int) -> tuple[IntArray, IntArray, IntArray]:
        order_N, random_N = self._pass(epoch)
        unit_U = order_N[place_U]
        sample_UK = self.units.rows(unit_U, random_N)
        spare_UKR = np.empty((*sample_UK.shape, 0), dtype=np.int64)
        if spares:
            following = spares - self.units.own_spares
            next_UR = order_N[(place_U[:, None] + np.arange(1, following + 1)) % len(order_N)]
            next_URK = self.units.rows(next_UR.reshape(-1), random_N).reshape(*next_UR.shape, -1)
            own_UKR = self.units.others(unit_U, random_N)
            spare_UKR = np.concatenate([own_UKR, next_URK.transpose(0, 2, 1)], axis=2)
        return sample_UK, np.full(len(unit_U), epoch), spare_UKR

    def _pass(self, epoch: int) -> tuple[IntArray, RawArray]:
        """The units of a pass in order, and the random numbers that order the images of each."""
        if epoch not in self._kept:
            first = epoch
            if self._chained:
                while first and first - 1 not in self._kept and self._seam(first * len(self.units))[0]:
                    first -= 1
            for each in range(first, epoch + 1):
                made = self._order(each), self._random(each, 0, self.units.draws)
                self._kept = {old: self._kept[old] for old in self._kept if old == each - 1}
                self._kept[each] = made
        return self._kept[epoch]

    @property
    def _chained(self) -> bool:
        """Whether the beginning of a pass, which depends on the pass before, reaches into the end of the pass."""
        return self._most <= len(self.units) < 2 * self._most

    def _order(self, epoch: int) -> IntArray:
        """The seeded order of a pass, changed so that no step across its beginning takes a unit twice."""
        count = len(self.units)
        order_N = np.argsort(self._keys(epoch), kind="stable")
        if not epoch or count < self._most:
            return order_N
        before, after = self._seam(epoch * count)
        if before:
            head = order_N[: before + after]
            taken = np.isin(head, self._tail(epoch - 1, before))
            chosen = np.flatnonzero(~taken)[:after]
            order_N[: before + after] = np.concatenate([head[chosen], np.delete(head, chosen)])
        return order_N

    def _tail(self, epoch: int, length: int) -> IntArray:
        """The last units of a pass, in any order."""
        count = len(self.units)
        if epoch in self._kept:
            return self._kept[epoch][0][count - length :]
        return np.argpartition(self._keys(epoch), count - length)[count - length :]

    def _keys(self, epoch: int) -> RawArray:
        return self._random(epoch, self.units.draws, len(self.units))


class Plan:
    """The global batches of a run.

    Args:
        sets: what to draw from; all with the same K.
        global_batch_size: G, a multiple of K.
        seed: not negative.
        weights: of each set; empty only for a single set.
        spares: whether to name spare samples, SPARES for each row.
        mixing: see `mixing.build_schedule`.
        steps: see `mixing.build_schedule`.
        groups: see `mixing.build_schedule`.

    Raises:
        UserError: a set is empty, holds fewer identities than a step takes of it, or would get no step.
    """

    def __init__(
        self,
        sets: Sequence[Units],
        global_batch_size: int,
        seed: int,
        weights: Sequence[float] = (),
        spares: bool = False,
        mixing: Mixing = "mixed",
        steps: int = 0,
        groups: Sequence[int] = (),
    ) -> None:
        self._images = sets[0].images
        self._units = global_batch_size // self._images
        self._spares = SPARES if spares else 0
        self._schedule = build_schedule(mixing, weights or [1.0], self._units, steps, groups)
        self.most = self._schedule.most()
        self._passes = [
            Passes(units, _raw(seed, number), _seams(self._schedule, number), most)
            for number, (units, most) in enumerate(zip(sets, self.most, strict=True))
        ]
        self._check()

    def step(self, step: int) -> Step:
        """The samples of a step, in the order in which ranks and micro-batches slice them."""
        owner_U = self._schedule.owners(step)
        sample_UK = np.empty((self._units, self._images), dtype=np.int64)
        epoch_U = np.empty(self._units, dtype=np.int64)
        spare_UKR = np.empty((self._units, self._images, self._spares), dtype=np.int64)
        for number, passes in enumerate(self._passes):
            mine = owner_U == number
            start, stop = self._schedule.taken(number, step), self._schedule.taken(number, step + 1)
            sample_UK[mine], epoch_U[mine], spare_UKR[mine] = passes.take(start, stop, self._spares)
        return Step(
            sample_UK.reshape(-1), np.repeat(epoch_U, self._images), spare_UKR.reshape(sample_UK.size, self._spares)
        )

    def passes(self, step: int) -> list[float]:
        """How often the steps before `step` go through each set."""
        return [self._schedule.taken(number, step) / len(each.units) for number, each in enumerate(self._passes)]

    def _check(self) -> None:
        for number, (each, most) in enumerate(zip(self._passes, self.most, strict=True)):
            place = f"set {number + 1} of the mix" if len(self._passes) > 1 else "the training set"
            if not len(each.units):
                raise UserError(f"data: {place} has no samples; check data.root and the split")
            if each.units.distinct and len(each.units) < most:
                raise UserError(
                    f"data: a batch takes {most} identities, but {place} has {len(each.units)}; "
                    f"lower data.global_batch_size or raise the images per identity"
                )


def local_batch_size(global_batch_size: int, world_size: int, accumulation: int = 1, images: int = 1) -> int:
    """B, the rows of one rank's micro-batch, when the global batch can be cut that way.

    Args:
        global_batch_size: G.
        world_size: W.
        accumulation: A.
        images: K of P×K batches; every micro-batch of W * B rows must hold whole identities.

    Raises:
        UserError: G is not a multiple of W * A, or G / A not one of K.
    """
    unit = math.lcm(world_size * accumulation, accumulation * images)
    if global_batch_size < 1 or global_batch_size % unit:
        below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        reason = f"world size {world_size}"
        if accumulation > 1:
            reason += f" x accumulation {accumulation}"
        if images > 1:
            reason += f" in whole identities of {images} images"
        raise UserError(
            f"data.global_batch_size: {global_batch_size} cannot be shared by {reason}; nearest that work: {nearest}"
        )
    return global_batch_size // (world_size * accumulation)


def micro_batches(
    plan_row_G: IntArray, rank: int, world_size: int, accumulation: int = 1, images: int = 1
) -> list[IntArray]:
    """The rows of a global batch that one rank computes.

    Micro-batch a is rows [a*W*B, (a+1)*W*B) of the step and rank r takes [r*B, (r+1)*B) of it: features gathered in
    rank order, micro-batch after micro-batch, are in the order of the plan at any world size.

    Args:
        plan_row_G: one step of a plan. Shape: (G,).
        rank: r.
        world_size: W.
        accumulation: A.
        images: K, see `local_batch_size`.

    Returns:
        A arrays of shape (B,).

    Raises:
        UserError: the batch cannot be cut that way.
    """
    rows = local_batch_size(len(plan_row_G), world_size, accumulation, images)
    return list(plan_row_G.reshape(accumulation, world_size, rows)[:, rank])


def occurrences(plan_row_G: IntArray) -> IntArray:
    """How often each entry has appeared before in the step: 0 for all when the samples are distinct.

    A sample that a step repeats must not get the same augmentation twice; the count is taken over the global batch,
    so it does not depend on the world size.

    Returns:
        Shape: (G,).
    """
    order = np.argsort(plan_row_G, kind="stable")
    result = np.empty(len(plan_row_G), dtype=np.int64)
    result[order] = places_in_runs(plan_row_G[order])
    return result


def _raw(seed: int, number: int) -> Callable[[int, int, int], RawArray]:
    """The random numbers of a set's passes; those of set 0 do not depend on whether there are others."""

    def random(epoch: int, skip: int, count: int) -> RawArray:
        # Raw 64-bit draws: numpy keeps these the same in all versions, unlike Generator.permutation.
        words = [seed, epoch, _PLAN_STREAM, *([number] if number else [])]
        source = np.random.PCG64(np.random.SeedSequence(words)).advance(skip)
        return np.asarray(source.random_raw(count), dtype=np.uint64)

    return random


def _seams(schedule: Schedule, number: int) -> Callable[[int], tuple[int, int]]:
    return lambda position: schedule.seam(number, position)
