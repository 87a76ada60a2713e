"""Streams over tars that exist as numbers only: every sample once a pass, exact resume, nothing lost when regrouped."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from webdataset.shardlists import split_by_node, split_by_worker

from reid_dist.data.stream import plan as stream_plan
from reid_dist.data.stream.plan import LanePosition, StreamPlan
from reid_dist.data.stream.position import (
    RankPosition,
    merge_positions,
    resume_position,
    start_position,
)
from reid_dist.data.stream.reader import LaneTar, PairStream
from reid_dist.data.stream.source import Pair, Tar
from reid_dist.errors import UserError

TARS = "a digest"


class Numbers:
    """A source whose tars hold given numbers of samples; counts how often each tar is opened."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self.opened: Counter[int] = Counter()

    def lane(self, first: int = 0) -> list[LaneTar]:
        return [LaneTar(self, Tar(str(n)), first + n) for n in range(len(self.counts))]  # type: ignore[arg-type]

    def pairs(self, tar: Tar, number: int, visit: int) -> Iterator[Pair]:
        self.opened[number] += 1
        for ordinal in range(self.counts[int(tar.location)]):
            yield Pair(number, visit, ordinal, f"{number}-{ordinal}", b"", b"", False, None, "")

    def describe(self, tar: Tar, key: str = "") -> str:
        return f"tar {tar.location}"


class Run:
    """All ranks of a run: which samples came, and the positions as they are saved."""

    def __init__(
        self, plan: StreamPlan, lanes: list[list[LaneTar]], positions: list[dict[str, Any]] | None = None
    ) -> None:
        self.plan = plan
        given = positions or [None] * plan.world_size
        self.starts = [start_position(plan, TARS, rank, position) for rank, position in enumerate(given)]
        weights = [(n + 1) / sum(range(1, len(lanes) + 1)) for n in range(len(lanes))]
        self.streams = [
            [
                PairStream(plan, lanes, weights, plan.slot(rank, worker), self.starts[rank].streams[worker])
                for worker in range(plan.workers)
            ]
            for rank in range(plan.world_size)
        ]

    def take(self, counts: dict[tuple[int, int], int] | int) -> list[tuple[int, int, int]]:
        """(tar, ordinal, visit) of so many samples of each stream."""
        found = []
        for rank, streams in enumerate(self.streams):
            for worker, stream in enumerate(streams):
                count = counts if isinstance(counts, int) else counts[rank, worker]
                found += [(pair.tar, pair.ordinal, pair.visit) for pair in (stream.take() for _ in range(count))]
        return found

    def positions(self) -> list[dict[str, Any]]:
        """Through JSON, as a checkpoint would keep them."""
        saved = []
        for rank, streams in enumerate(self.streams):
            values = self.starts[rank].model_dump() | {
                "streams": [[lane.model_dump() for lane in stream.positions] for stream in streams]
            }
            saved.append(json.loads(json.dumps(values)))
        return saved


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_pass_is_dealt_as_webdataset_deals(world_size: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = StreamPlan((13,), 5, world_size, workers)
    order = StreamPlan((13,), 5).share(0, 0, 0)
    assert sorted(order) == list(range(13)) != order
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("NUM_WORKERS", str(workers))
    for rank in range(world_size):
        for worker in range(workers):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORKER", str(worker))
            theirs = list(split_by_worker(split_by_node(iter(order))))
            assert plan.share(0, 0, plan.slot(rank, worker)) == theirs
    for number in range(1, 4):
        shares = [plan.share(0, number, slot) for slot in range(plan.streams)]
        assert sorted(chain(*shares)) == list(range(13))
    sizes = [sum(len(plan.share(0, n, slot)) for n in range(plan.streams)) for slot in range(plan.streams)]
    assert set(sizes) == {13}  # what is left over goes to another stream each time


def _naive_buffer(counts: list[int], plan: StreamPlan, taken: int) -> list[int]:
    """The buffer by the rule itself, sample after sample."""
    coming = iter(range(sum(counts)))
    raw = plan.draws(0, 0, 0).random_raw(max(1, taken)).tolist()
    held = list(islice(coming, plan.shuffle_buffer))
    for draw in raw[:taken]:
        place, new = draw % len(held), next(coming, None)
        if new is None:
            held[place] = held[-1]
            held.pop()
        else:
            held[place] = new
    return held


@pytest.mark.parametrize("seed", range(25))
def test_the_buffer_follows_from_the_numbers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_plan, "_CHUNK", 5)
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 12, rng.integers(1, 6)).tolist()
    total = sum(counts)
    plan = StreamPlan((len(counts),), seed, shuffle_buffer=int(rng.integers(1, 15)))
    for taken in range(1, total + 1):
        ends = np.cumsum(counts)
        read = min(total, taken + plan.shuffle_buffer)
        finished = len(counts) if taken + plan.shuffle_buffer > total else int((ends <= read).sum())
        position = LanePosition(taken=taken, counts=counts[:finished])
        assert position.buffer(plan, 0, 0, range(len(counts))).tolist() == _naive_buffer(counts, plan, taken)


def _random_case(seed: int) -> tuple[np.random.Generator, Numbers, StreamPlan]:
    rng = np.random.default_rng(seed)
    world_size, workers = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    tars = world_size * workers + int(rng.integers(0, 8))
    numbers = Numbers(rng.integers(1, 15, tars).tolist())
    plan = StreamPlan((tars,), seed, world_size, workers, int(rng.integers(1, 25)))
    return rng, numbers, plan


def _all(numbers: Numbers) -> Counter[tuple[int, int]]:
    return Counter((tar, n) for tar, count in enumerate(numbers.counts) for n in range(count))


def _pass_lengths(plan: StreamPlan, numbers: Numbers, number: int) -> dict[tuple[int, int], int]:
    return {
        (rank, worker): sum(numbers.counts[tar] for tar in plan.share(0, number, plan.slot(rank, worker)))
        for rank in range(plan.world_size)
        for worker in range(plan.workers)
    }


@pytest.mark.parametrize("seed", range(30))
def test_every_pass_delivers_every_sample_once(seed: int) -> None:
    _, numbers, plan = _random_case(seed)
    run = Run(plan, [numbers.lane()])
    for number in range(3):
        found = run.take(_pass_lengths(plan, numbers, number))
        assert Counter(each[:2] for each in found) == _all(numbers)
        assert {visit for _, _, visit in found} == {number}


@pytest.mark.parametrize("seed", range(30))
def test_resume_goes_on_exactly(seed: int) -> None:
    rng, numbers, plan = _random_case(seed)
    if seed % 3 == 0:
        plan = StreamPlan(plan.tars, seed, plan.world_size, plan.workers, plan.shuffle_buffer, resampled=True)
    lanes = [numbers.lane()]
    if seed % 2:
        other = Numbers([4] * plan.streams)
        lanes.append(other.lane(first=len(numbers.counts)))
        plan = StreamPlan((*plan.tars, plan.streams), seed, plan.world_size, plan.workers, plan.shuffle_buffer)
    run = Run(plan, lanes)
    for _ in range(6):
        count = int(rng.integers(0, 30))
        run.take(count)
        resumed = Run(plan, lanes, run.positions())
        assert resumed.positions() == run.positions()
        ahead = resumed.take(37)
        straight = Run(plan, lanes, run.positions())
        assert straight.take(37) == ahead
        run_on = run.take(37)
        assert run_on == ahead
        assert resumed.positions() == run.positions()


@pytest.mark.parametrize("seed", range(40))
def test_another_number_of_streams_loses_nothing_and_counts_what_it_repeats(seed: int) -> None:
    rng, numbers, plan = _random_case(seed)
    run = Run(plan, [numbers.lane()])
    # Unequal progress: some streams are passes ahead of others.
    found = run.take({each: int(rng.integers(0, 60)) for each in _pass_lengths(plan, numbers, 0)})
    begun = 1 + max(stream.positions[0].number for rank in run.streams for stream in rank)
    expected_repeats = 0
    for last in (False, True):  # a regrouped run is regrouped again before it has caught up
        merged, repeats = merge_positions(run.positions())
        expected_repeats += repeats
        merged = json.loads(json.dumps(merged))
        world_size = int(rng.integers(1, min(4, len(numbers.counts) + 1)))
        workers = int(rng.integers(1, 1 + len(numbers.counts) // world_size))
        plan = StreamPlan(plan.tars, plan.seed, world_size, workers, plan.shuffle_buffer)
        run = Run(plan, [numbers.lane()], [merged] * world_size)
        left = {
            (rank, worker): sum(numbers.counts[tar] for tar in stream.positions[0].share or [])
            for rank, streams in enumerate(run.streams)
            for worker, stream in enumerate(streams)
        }
        found += run.take({each: count if last else int(rng.integers(0, count + 1)) for each, count in left.items()})
    counts = Counter(each[:2] for each in found)
    assert set(counts) == set(_all(numbers)) and min(counts.values()) >= begun
    assert sum(counts.values()) - begun * sum(numbers.counts) == expected_repeats
    # From here on passes are whole again.
    after = run.take(_pass_lengths(plan, numbers, merged["numbers"][0] + 1))
    assert Counter(each[:2] for each in after) == _all(numbers)


def test_resume_opens_only_what_the_buffer_needs() -> None:
    numbers = Numbers([100] * 40)
    plan = StreamPlan((40,), 0, shuffle_buffer=20)
    run = Run(plan, [numbers.lane()])
    run.take(3000)
    saved = run.positions()
    numbers.opened.clear()
    Run(plan, [numbers.lane()], saved).take(1)
    assert 1 <= sum(numbers.opened.values()) <= 4


def test_a_long_pass_is_found_again_at_once() -> None:
    plan = StreamPlan((3,), 0, shuffle_buffer=1000)
    position = LanePosition(taken=10**12, counts=[10**12])
    held = position.buffer(plan, 0, 0, range(3))
    assert len(set(held.tolist())) == 1000 and held.max() == 10**12 + 999
    assert held.min() > 10**12 - 30_000


def test_resampled_streams_differ_and_draw_again() -> None:
    numbers = Numbers([3] * 5)
    plan = StreamPlan((5,), 1, 2, 2, shuffle_buffer=4, resampled=True)
    run = Run(plan, [numbers.lane()])
    per_stream = [[pair.key for pair in (stream.take() for _ in range(60))] for rank in run.streams for stream in rank]
    assert len({tuple(keys) for keys in per_stream}) == 4
    assert all(max(Counter(keys).values()) > 1 for keys in per_stream)
    # The same sample twice in a pass must not look the same twice.
    seen = [(tar, n, visit) for tar, n, visit in run.take(300)]
    assert len(set(seen)) == len(seen)
    merged, repeats = merge_positions(run.positions())
    assert repeats == 0 and merged["remaining"] == [[]]
    Run(StreamPlan((5,), 1, 3, 4, 4, resampled=True), [numbers.lane()], [merged] * 3).take(20)


def test_weights_hold_in_every_stretch() -> None:
    small, large = Numbers([7, 5]), Numbers([50, 40, 60])
    plan = StreamPlan((2, 3), 3, shuffle_buffer=10)
    run = Run(plan, [small.lane(), large.lane(first=2)])  # weights 1/3, 2/3
    found = [tar for tar, _, _ in run.take(600)]
    for first in range(0, 600, 30):
        assert sum(tar < 2 for tar in found[first : first + 30]) == 10


def test_positions_that_do_not_belong_are_refused() -> None:
    numbers = Numbers([5] * 6)
    plan = StreamPlan((6,), 0, 2, 1, 3)
    positions = Run(plan, [numbers.lane()]).positions()
    with pytest.raises(UserError, match="those of 0 are there, but of 2 ranks; give the position of every rank"):
        merge_positions(positions[:1])
    with pytest.raises(UserError, match="not of one run and step"):
        merge_positions([positions[0], {**positions[1], "step": 4}])
    with pytest.raises(UserError, match=r"saved with 2 ranks x 1 workers, the run has 1 x 2; merge"):
        start_position(StreamPlan((6,), 0, 1, 2, 3), TARS, 0, positions[0])
    with pytest.raises(UserError, match="that of rank 1, this is rank 0"):
        start_position(plan, TARS, 0, positions[1])
    with pytest.raises(UserError, match="saved with another tars, or exclusions"):
        start_position(plan, "other", 0, positions[0])
    with pytest.raises(UserError, match=r"another shuffle_buffer \(3, now 4\)"):
        start_position(StreamPlan((6,), 0, 2, 1, 4), TARS, 0, positions[0])
    with pytest.raises(UserError, match="not one entry for each worker and lane"):
        start_position(plan, TARS, 0, {**positions[0], "streams": []})
    with pytest.raises(UserError, match="stream position: step: Input should be a valid integer"):
        start_position(plan, TARS, 0, {**positions[0], "step": "1"})


def test_own_position_where_nothing_changed() -> None:
    numbers = Numbers([5] * 6)
    run = Run(StreamPlan((6,), 0, 2, 1, 3), [numbers.lane()])
    run.take(4)
    positions = run.positions()
    assert resume_position(positions, 1, 2, 0) == (positions[1], 0)
    merged, repeats = resume_position(positions, 0, 1, 1)
    assert repeats > 0 and (merged, repeats) == merge_positions(positions)
    RankPosition.model_validate(positions[0])


def test_a_tar_that_shrank_is_named() -> None:
    numbers = Numbers([9, 9])
    plan = StreamPlan((2,), 0, shuffle_buffer=5)
    run = Run(plan, [numbers.lane()])
    run.take(5)
    numbers.counts = [2, 2]
    with pytest.raises(UserError, match=r"tar \d: holds fewer samples than when the position was saved"):
        Run(plan, [numbers.lane()], run.positions())


def test_empty_tars_are_passed_over_and_nothing_at_all_is_an_error() -> None:
    numbers = Numbers([0, 0, 4])
    plan = StreamPlan((3,), 0, 1, 3)
    found = Run(plan, [numbers.lane()]).take(4)
    assert Counter(each[:2] for each in found if each[2] == 0) == {(2, n): 1 for n in range(4)}
    with pytest.raises(UserError, match="no samples in it, nor in the tars read after it"):
        Run(plan, [Numbers([0, 0, 0]).lane()]).take(1)


@pytest.mark.parametrize("seed", range(10))
def test_each_lane_is_merged_by_itself(seed: int) -> None:
    """Within the first pass, against counting what came of each tar."""
    rng = np.random.default_rng(seed)
    lanes = [Numbers(rng.integers(3, 9, 6).tolist()), Numbers(rng.integers(6, 18, 7).tolist())]
    plan = StreamPlan((6, 7), seed, 2, 2, int(rng.integers(1, 7)))
    run = Run(plan, [lanes[0].lane(), lanes[1].lane(first=6)])
    came = Counter(tar for tar, _, visit in run.take(int(rng.integers(1, 8))) if visit == 0)
    assert all(lane["number"] == 0 for each in run.positions() for stream in each["streams"] for lane in stream)
    merged, repeats = merge_positions(run.positions())
    left = {tar for tar, count in enumerate(lanes[0].counts + lanes[1].counts) if came[tar] < count}
    assert [sorted(each) for each in merged["remaining"]] == [
        sorted(tar for tar in left if tar < 6),
        sorted(tar - 6 for tar in left if tar >= 6),
    ]
    assert merged["numbers"] == [1, 1] and repeats == sum(came[tar] for tar in left)
