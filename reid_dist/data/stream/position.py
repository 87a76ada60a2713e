"""Positions of streams as checkpoints keep them, and what is left when the number of streams changes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reid_dist.data.stream.plan import LanePosition, StreamPlan
from reid_dist.errors import UserError


class RankPosition(BaseModel):
    """The position of one rank (JSON-able by `model_dump`), see `StreamLoader.position`.

    Attributes:
        tars: digest of the tars and of what is read of them.
        lanes: number of tars of each lane.
        step: optimizer steps that were taken.
        turn: the worker whose batch is next.
        seen: samples read by this rank.
        bad: how many of them were bad.
        streams: for each worker, where it stands in each lane.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(1, ge=1, le=1)
    tars: str
    lanes: list[int]
    seed: int
    shuffle_buffer: int
    resampled: bool
    world_size: int
    rank: int
    workers: int
    step: int
    turn: int
    seen: int = 0
    bad: int = 0
    streams: list[list[LanePosition]]

    @model_validator(mode="after")
    def _consistent(self) -> "RankPosition":
        if len(self.streams) != self.workers or {len(each) for each in self.streams} != {len(self.lanes)}:
            raise ValueError("not one entry for each worker and lane")
        return self

    @property
    def plan(self) -> StreamPlan:
        """The plan that the position belongs to."""
        return StreamPlan(
            tuple(self.lanes), self.seed, self.world_size, self.workers, self.shuffle_buffer, self.resampled
        )


class MergedPosition(BaseModel):
    """What the positions of all ranks come to, for any number of streams; see `merge_positions`.

    Attributes:
        numbers: the pass of each lane in which the remaining tars are visited.
        remaining: these tars, in order.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(1, ge=1, le=1)
    tars: str
    lanes: list[int]
    seed: int
    shuffle_buffer: int
    resampled: bool
    step: int
    seen: int
    bad: int
    numbers: list[int]
    remaining: list[list[int]]


def merge_positions(positions: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Positions of all ranks to one from which any number of ranks and workers can go on.

    Nothing is lost: every tar whose samples were not all taken in a pass that some stream has begun is visited (again)
    before the next pass. Those of its samples that were taken before come a second time.

    Args:
        positions: what `StreamLoader.position` gave on each rank after the same step, in any order.

    Returns:
        A position for `StreamLoader`, and the number of samples that will be repeated.

    Raises:
        UserError: not positions, not of all ranks, or not of one run and step.
    """
    ranks = sorted((_parse(RankPosition, each) for each in positions), key=lambda each: each.rank)
    if not ranks or [each.rank for each in ranks] != list(range(ranks[0].world_size)):
        there = ", ".join(str(each.rank) for each in ranks) or "no rank"
        of = f"{ranks[0].world_size} ranks" if ranks else "a run"
        raise UserError(f"stream positions: those of {there} are there, but of {of}; give the position of every rank")
    first = ranks[0]
    if any((each.plan, each.tars, each.step) != (first.plan, first.tars, first.step) for each in ranks):
        raise UserError("stream positions: the ranks' are not of one run and step; give those of one checkpoint")
    numbers, remaining, repeats = [], [], 0
    for lane in range(len(first.lanes)):
        number, left, repeated = _merge_lane(ranks, lane)
        numbers.append(number)
        remaining.append(left)
        repeats += repeated
    merged = MergedPosition(
        **first.model_dump(include={"tars", "lanes", "seed", "shuffle_buffer", "resampled", "step"}),
        seen=sum(each.seen for each in ranks),
        bad=sum(each.bad for each in ranks),
        numbers=numbers,
        remaining=remaining,
    )
    return merged.model_dump(), repeats


def resume_position(
    positions: Sequence[dict[str, Any]], rank: int, world_size: int, workers: int
) -> tuple[dict[str, Any], int]:
    """The position for one rank of a run that goes on: its own when nothing changed, otherwise the merged one.

    Args:
        positions: see `merge_positions`.
        rank: of this process.
        world_size: number of ranks now.
        workers: reading processes per rank now.

    Returns:
        A position for `StreamLoader`, and the number of samples that all ranks together will repeat.

    Raises:
        UserError: as `merge_positions`.
    """
    merged, repeats = merge_positions(positions)
    for each in positions:
        if (each["world_size"], each["workers"], each["rank"]) == (world_size, max(1, workers), rank):
            return each, 0
    return merged, repeats


def start_position(plan: StreamPlan, tars: str, rank: int, position: dict[str, Any] | None = None) -> RankPosition:
    """Where a rank begins: at the start, at its own position, or at its share of a merged one.

    Args:
        plan: of the run that begins.
        tars: digest of what is read.
        rank: of this process.
        position: what `StreamLoader.position` or `merge_positions` gave.

    Raises:
        UserError: a position of other data or settings, or one of another number of streams that was not merged.
    """
    lanes = range(len(plan.tars))
    start = RankPosition(
        tars=tars,
        lanes=list(plan.tars),
        seed=plan.seed,
        shuffle_buffer=plan.shuffle_buffer,
        resampled=plan.resampled,
        world_size=plan.world_size,
        rank=rank,
        workers=plan.workers,
        step=0,
        turn=0,
        streams=[[LanePosition() for _ in lanes] for _ in range(plan.workers)],
    )
    if position is None:
        return start
    if "remaining" in position:
        merged = _parse(MergedPosition, position)
        _require_same(merged, start)
        start.step = merged.step
        start.seen, start.bad = merged.seen // plan.world_size, merged.bad // plan.world_size
        for worker, stream in enumerate(start.streams):
            slot = plan.slot(rank, worker)
            for lane in lanes:
                share = merged.remaining[lane][slot :: plan.streams]
                stream[lane] = LanePosition(number=merged.numbers[lane], share=None if plan.resampled else share)
        return start
    own = _parse(RankPosition, position)
    _require_same(own, start)
    if (own.world_size, own.workers) != (plan.world_size, plan.workers):
        raise UserError(
            f"stream position: saved with {own.world_size} ranks x {own.workers} workers, the run has "
            f"{plan.world_size} x {plan.workers}; merge the positions of all ranks (`merge_positions`), or use as many"
        )
    if own.rank != rank:
        raise UserError(f"stream position: that of rank {own.rank}, this is rank {rank}; give each rank its own")
    return own


def digest(parts: Iterable[object]) -> str:
    """A short name for data: hex digits of a hash over the text of all parts."""
    lines = (json.dumps(part, separators=(",", ":")).encode() + b"\n" for part in parts)
    result = hashlib.sha256()
    for line in lines:
        result.update(line)
    return result.hexdigest()[:32]


def _merge_lane(ranks: Sequence[RankPosition], lane: int) -> tuple[int, list[int], int]:
    """Number of the pass that takes up what remains, the tars, and the number of repeated samples."""
    plan = ranks[0].plan
    streams = [
        (plan.slot(each.rank, worker), stream[lane]) for each in ranks for worker, stream in enumerate(each.streams)
    ]
    last = max(position.number for _, position in streams)
    if plan.resampled:
        return last + 1, [], 0
    remaining, repeats = [], 0
    for slot, position in streams:
        share = plan.share(lane, position.number, slot) if position.share is None else position.share
        taken = _taken_per_tar(plan, lane, slot, position, share)
        for place, tar in enumerate(share):
            if place >= len(position.counts) or taken[place] != position.counts[place]:
                remaining.append(tar)
                repeats += taken[place]
        for number in range(position.number + 1, last + 1):
            remaining += plan.share(lane, number, slot)
    return last + 1, plan.mixed(lane, last + 1, remaining), repeats


def _taken_per_tar(plan: StreamPlan, lane: int, slot: int, position: LanePosition, share: Sequence[int]) -> list[int]:
    """How many samples of each tar of a share left the buffer."""
    read = [*position.counts, position.read(plan, share) - sum(position.counts)][: len(share)]
    tars = np.searchsorted(np.cumsum(position.counts), position.buffer(plan, lane, slot, share), side="right")
    held = np.bincount(tars, minlength=len(share)).tolist()
    return [count - held[place] for place, count in enumerate(read)] + [0] * (len(share) - len(read))


def _require_same(saved: RankPosition | MergedPosition, now: RankPosition) -> None:
    meanings = {
        "lanes": "number of tars",
        "tars": "tars, or exclusions",
        "seed": "seed",
        "shuffle_buffer": "shuffle_buffer",
        "resampled": "resampled",
    }
    for name, meaning in meanings.items():
        if getattr(saved, name) != getattr(now, name):
            raise UserError(
                f"stream position: saved with another {meaning} ({getattr(saved, name)}, now {getattr(now, name)}); "
                f"go on with the data and settings of before, or start the stage anew"
            )


_Position = TypeVar("_Position", RankPosition, MergedPosition)


def _parse(kind: type[_Position], position: dict[str, Any]) -> _Position:
    try:
        return kind.model_validate(position)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"stream position: {place}: {problem['msg']}; give what `StreamLoader.position` saved"
        ) from None
