"""Plans: what a step holds, how a batch meets the end of an epoch, and shares of several sets."""

import itertools

import numpy as np
import pytest

from reid_dist.data.sampler import SPARES, Plan, Step, local_batch_size, micro_batches, occurrences
from reid_dist.data.units import Identities, Samples
from reid_dist.errors import UserError


def _random(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence([seed, epoch, 0x504C414E])).random_raw(count)


def _steps(plan: Plan, count: int) -> list[Step]:
    return [plan.step(step) for step in range(count)]


def test_the_first_epoch_is_one_seeded_permutation() -> None:
    # A changed order would break resumed runs and golden curves.
    for count, batch, seed in ((100, 24, 3), (1000, 120, 0), (7, 7, 9)):
        expected = np.argsort(_random(seed, 0, count), kind="stable")
        plan = Plan([Samples(count)], batch, seed)
        for step in range(count // batch):
            assert plan.step(step).sample_G.tolist() == expected[step * batch : (step + 1) * batch].tolist()
            assert not plan.step(step).epoch_G.any()


def test_order_is_pinned() -> None:
    plan = Plan([Samples(10)], 4, seed=7)
    assert [plan.step(step).sample_G.tolist() for step in range(5)] == PINNED_EPOCH
    pid, camid = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 0, 0, 1, -1])
    assert [row.sample_G.tolist() for row in _steps(Plan([Identities(pid, camid, 2)], 4, seed=7), 3)] == PINNED_IDENTITY
    mix = Plan([Samples(4), Samples(20, first=4)], 4, 7, weights=[1, 3])
    assert [row.sample_G.tolist() for row in _steps(mix, 3)] == PINNED_MIX


PINNED_EPOCH = [[7, 6, 4, 0], [8, 5, 9, 1], [3, 2, 7, 9], [8, 1, 3, 4], [6, 5, 2, 0]]
PINNED_IDENTITY = [[4, 3, 0, 1], [5, 5, 3, 4], [5, 5, 1, 0]]
PINNED_MIX = [[14, 0, 10, 11], [5, 1, 7, 15], [4, 3, 12, 16]]


def test_a_batch_goes_on_with_the_next_epoch() -> None:
    plan = Plan([Samples(10)], 4, seed=0)
    epochs = [row.epoch_G.tolist() for row in _steps(plan, 5)]
    assert epochs == [[0] * 4, [0] * 4, [0, 0, 1, 1], [1] * 4, [1] * 4]
    rows = np.concatenate([row.sample_G for row in _steps(plan, 5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert plan.passes(0) == [0.0] and plan.passes(5) == [2.0] and plan.passes(2) == [0.8]


def test_later_orders_are_permutations_that_change_only_where_a_batch_would_repeat() -> None:
    count, batch = 1000, 64
    plan = Plan([Samples(count)], batch, seed=5)
    stream = np.concatenate([row.sample_G for row in _steps(plan, 5 * count // batch + 1)])
    for epoch in range(1, 5):
        drawn = np.argsort(_random(5, epoch, count), kind="stable").tolist()
        start = epoch * count
        before = start % batch
        old = set(stream[start - before : start].tolist())
        head = [each for each in drawn if each not in old][: batch - before]
        expected = head + [each for each in drawn if each not in head]
        assert stream[start : start + count].tolist() == expected


def test_epochs_and_seeds_differ() -> None:
    plans = [Plan([Samples(100)], 100, seed).step(step).sample_G for seed, step in itertools.product([0, 1], [0, 1])]
    for a, b in itertools.combinations(plans, 2):
        assert not np.array_equal(a, b)
    # The sets of a mix have orders of their own.
    both = Plan([Samples(50), Samples(50)], 100, 0, weights=[1, 1]).step(0).sample_G
    assert not np.array_equal(both[::2], both[1::2])


def test_a_set_smaller_than_a_batch_repeats_evenly() -> None:
    plan = Plan([Samples(5)], 12, seed=0)
    assert sorted(np.bincount(plan.step(0).sample_G)) == [2, 2, 2, 3, 3]
    assert plan.step(0).epoch_G.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    everything = np.concatenate([row.sample_G for row in _steps(plan, 5)])
    assert np.bincount(everything).tolist() == [12] * 5
    assert Plan([Samples(1)], 3, seed=0).step(9).sample_G.tolist() == [0, 0, 0]


def test_refusals() -> None:
    pid = np.array([0, 0, 1])
    with pytest.raises(UserError, match=r"takes 3 identities, but the training set has 2; lower data.global_batch"):
        Plan([Identities(pid, pid, 2)], 6, 0)
    with pytest.raises(UserError, match="takes 3 identities, but set 2 of the mix has 2"):
        Plan([Identities(np.arange(9), pid, 1), Identities(pid, pid, 1)], 6, 0, weights=[1, 1])
    with pytest.raises(UserError, match=r"the training set has no samples; check data\.root"):
        Plan([Samples(0)], 4, 0)


def test_sets_of_a_mix_run_their_own_epochs() -> None:
    plan = Plan([Samples(6), Samples(30, first=6)], 8, 1, weights=[1, 1])
    rows = _steps(plan, 30)
    sample, epoch = (np.concatenate([getattr(row, name) for row in rows]) for name in ("sample_G", "epoch_G"))
    for first, count in ((0, 6), (6, 30)):
        mine = (sample >= first) & (sample < first + count)
        assert mine.sum() == 120
        assert epoch[mine].tolist() == (np.arange(120) // count).tolist()
        for each in range(120 // count):
            assert sorted(sample[mine & (epoch == each)]) == list(range(first, first + count))
    for row in rows:  # never a sample twice in a batch, also where an epoch ends in it
        assert len(set(row.sample_G.tolist())) == 8
    assert plan.passes(30) == [20.0, 4.0]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_spares_are_the_next_samples_of_the_epoch(count: int) -> None:
    plan = Plan([Samples(count)], 4, 0, spares=True)
    stream = np.concatenate([row.sample_G for row in _steps(plan, 3 * count)])
    epochs = stream[: 3 * count].reshape(3, count)
    for step in range(count // 4):
        row = plan.step(step)
        assert row.spare_GR.shape == (4, SPARES)
        for place in range(4):
            own = epochs[row.epoch_G[place]].tolist()
            here = own.index(row.sample_G[place])
            assert row.spare_GR[place].tolist() == [own[(here + 1 + k) % count] for k in range(SPARES)]
    assert Plan([Samples(count)], 4, 0).step(0).spare_GR.shape == (4, 0)


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_rank_slices_join_to_the_global_batch(world_size: int, accumulation: int) -> None:
    row = Plan([Samples(6000)], 5040, seed=0).step(0).sample_G
    parts = [micro_batches(row, rank, world_size, accumulation) for rank in range(world_size)]
    joined = np.concatenate([parts[rank][a] for a in range(accumulation) for rank in range(world_size)])
    assert np.array_equal(joined, row)
    assert {len(part) for rank in parts for part in rank} == {5040 // (world_size * accumulation)}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (8, 1), (1, 4), (8, 2)])
def test_micro_batches_hold_whole_identities(world_size: int, accumulation: int) -> None:
    pid = np.repeat(np.arange(32), 6)
    row = Plan([Identities(pid, pid % 5, 4)], 64, seed=0).step(0).sample_G
    parts = [micro_batches(row, rank, world_size, accumulation, images=4) for rank in range(world_size)]
    for a in range(accumulation):
        micro = np.concatenate([rank[a] for rank in parts])
        assert set(np.unique(pid[micro], return_counts=True)[1]) == {4}


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulation", "images", "nearest"),
    [
        (64, 3, 1, 1, "world size 3; nearest that work: 63 or 66"),
        (64, 3, 2, 1, "world size 3 x accumulation 2; nearest that work: 60 or 66"),
        (2, 4, 1, 1, "nearest that work: 4"),
        (20, 1, 2, 4, "whole identities of 4 images; nearest that work: 16 or 24"),
        (0, 2, 1, 1, "nearest that work: 2"),
    ],
)
def test_batches_that_cannot_be_shared(
    batch: int, world_size: int, accumulation: int, images: int, nearest: str
) -> None:
    with pytest.raises(UserError, match=nearest) as caught:
        local_batch_size(batch, world_size, accumulation, images)
    assert str(caught.value).startswith("data.global_batch_size: ")


def test_a_rank_may_hold_part_of_an_identity() -> None:
    # Losses are taken over the gathered micro-batch, so only that must hold whole identities.
    assert local_batch_size(8, 8, 1, images=4) == 1


def test_occurrences() -> None:
    assert occurrences(np.array([4, 2, 4, 4, 2, 7])).tolist() == [0, 0, 1, 2, 1, 0]
    assert occurrences(np.array([5])).tolist() == [0]
