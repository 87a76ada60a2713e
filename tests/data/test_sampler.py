"""Plans: every world size sees the same global batches, and every epoch each sample or identity once."""

import itertools

import numpy as np
import pytest

from reid_dist.data.sampler import (
    epoch_plan,
    identity_plan,
    local_batch_size,
    micro_batches,
    occurrences,
)
from reid_dist.errors import UserError


@pytest.mark.parametrize(("count", "batch"), [(24, 24), (100, 24), (1000, 120), (120, 1)])
def test_epoch_takes_each_sample_at_most_once(count: int, batch: int) -> None:
    plan = epoch_plan(count, batch, seed=3, epoch=1)
    assert plan.shape == (count // batch, batch) and plan.dtype == np.int64
    assert len(np.unique(plan)) == plan.size
    assert plan.min() >= 0 and plan.max() < count


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plans = [epoch_plan(100, 10, seed, epoch) for seed, epoch in itertools.product([0, 1], [0, 1])]
    for a, b in itertools.combinations(plans, 2):
        assert not np.array_equal(a, b)
    assert np.array_equal(plans[3], epoch_plan(100, 10, 1, 1))
    # The remainder changes, so that all samples are seen in the long run.
    assert len(np.unique(np.concatenate([epoch_plan(15, 10, 0, epoch) for epoch in range(20)]))) == 15


def test_small_sets_wrap() -> None:
    plan = epoch_plan(5, 12, seed=0, epoch=0)
    assert plan.shape == (1, 12)
    assert sorted(np.bincount(plan[0])) == [2, 2, 2, 3, 3]


def test_order_is_pinned() -> None:
    # A changed order would break resumed runs and golden curves.
    assert epoch_plan(8, 4, seed=7, epoch=2).tolist() == PINNED_EPOCH
    assert identity_plan(np.array([0, 0, 1, 1, 1, 2]), 1, 2, seed=7, epoch=2).tolist() == PINNED_IDENTITY


PINNED_EPOCH = [[2, 5, 4, 7], [1, 0, 3, 6]]
PINNED_IDENTITY = [[2, 4], [5, 5], [1, 0]]


@pytest.mark.parametrize(("identities", "images"), [(1, 2), (4, 4), (7, 3), (20, 1)])
def test_identity_plan_takes_each_identity_once(identities: int, images: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 9, 20)
    pid = np.random.default_rng(1).permutation(np.repeat(np.arange(20) * 3, sizes))
    seen = set()
    for epoch in range(5):
        plan = identity_plan(pid, identities, images, seed=5, epoch=epoch)
        assert plan.shape == (20 // identities, identities * images)
        groups = plan.reshape(-1, images)
        owner = pid[groups]
        assert (owner == owner[:, :1]).all()
        assert len(np.unique(owner[:, 0])) == len(owner)
        for group, person in zip(groups, owner[:, 0], strict=True):
            have = int((pid == person).sum())
            copies = np.unique(group, return_counts=True)[1]
            assert len(copies) == min(have, images)
            assert copies.max() - copies.min() <= 1
        seen.update(groups.ravel().tolist())
    if images > 1 and identities == 4:
        assert len(seen) > 0.8 * len(pid)


def test_too_few_identities() -> None:
    with pytest.raises(UserError, match="takes 3 identities, but the training set has 2"):
        identity_plan(np.array([0, 0, 1]), 3, 2, 0, 0)
    with pytest.raises(UserError, match="no samples"):
        epoch_plan(0, 4, 0, 0)


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_rank_slices_join_to_the_global_batch(world_size: int, accumulation: int) -> None:
    row = epoch_plan(6000, 5040, seed=0, epoch=0)[0]
    parts = [micro_batches(row, rank, world_size, accumulation) for rank in range(world_size)]
    joined = np.concatenate([parts[rank][a] for a in range(accumulation) for rank in range(world_size)])
    assert np.array_equal(joined, row)
    assert {len(part) for rank in parts for part in rank} == {5040 // (world_size * accumulation)}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (8, 1), (1, 4), (8, 2)])
def test_micro_batches_hold_whole_identities(world_size: int, accumulation: int) -> None:
    pid = np.repeat(np.arange(32), 6)
    row = identity_plan(pid, 16, 4, seed=0, epoch=0)[0]
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
