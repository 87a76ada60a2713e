"""Shares and turns of several sets, beside counting by hand."""

import itertools

import numpy as np
import pytest

from reid_dist.data.mixing import Mix, Schedule, build_schedule
from reid_dist.errors import UserError


@pytest.mark.parametrize(
    ("weights", "units"),
    [([5, 3, 2], 10), ([0.5, 0.3, 0.2], 7), ([1, 1, 1], 7), ([0.97, 0.03], 5), ([1 / 3, 0.1, 3], 16), ([4], 9)],
)
def test_a_mix_is_exact_in_the_long_run_and_spread_evenly(weights: list[float], units: int) -> None:
    mix = Mix(weights, units)
    share = np.array(weights) / sum(weights)
    total = np.zeros(len(weights), dtype=int)
    for step in range(300):
        assert [mix.taken(number, step) for number in range(len(weights))] == total.tolist()
        assert np.abs(total - step * units * share).max() <= len(weights) / 2
        owners = mix.owners(step)
        found = np.bincount(owners, minlength=len(weights))
        assert (found <= mix.most()).all() and len(owners) == units
        # Halves of a batch hold about the same mix, so micro-batches and ranks do too.
        half = np.bincount(owners[: units // 2], minlength=len(weights))
        assert np.abs(half - (units // 2) * share).max() <= len(weights)
        total += found
    if weights == [5, 3, 2]:
        assert total.tolist() == [1500, 900, 600]


def test_a_mix_knows_where_a_step_begins() -> None:
    mix = Mix([0.7, 0.2, 0.1], 6)
    for number in range(3):
        for position in range(40):
            before, after = mix.seam(number, position)
            step = next(each for each in itertools.count() if mix.taken(number, each + 1) > position)
            assert before == position - mix.taken(number, step)
            assert after == mix.taken(number, step + 1) - position


def test_shares_stay_exact_after_a_long_run() -> None:
    mix = Mix([0.123457, 0.876543], 4096)
    step = 100_000_000
    assert mix.taken(0, step) == round(step * 4096 * 123457 / 1_000_000)
    assert mix.taken(0, step) + mix.taken(1, step) == step * 4096
    assert np.bincount(mix.owners(step)).sum() == 4096


def _counted(schedule: Schedule, sets: int, steps: int) -> np.ndarray:
    """Units of each set that each step takes, all else being checked against them. Shape: (steps, S)."""
    owners = [schedule.owners(step) for step in range(steps)]
    found = np.array([np.bincount(each, minlength=sets) for each in owners])
    for number in range(sets):
        assert [schedule.taken(number, step) for step in range(steps)] == [0, *found[:-1, number].cumsum()]
        assert schedule.most()[number] >= found[:, number].max()
        # Step by step, where each unit of a set is.
        sizes = found[:, number].tolist()
        position = 0
        for size in sizes:
            for before in range(size):
                assert schedule.seam(number, position + before) == (before, size - before)
            position += size
    return found


@pytest.mark.parametrize("groups", [[], [7, 7, 7, 7], [3, 1, 4, 2]])
def test_groups_of_one_or_of_all_change_nothing(groups: list[int]) -> None:
    weights = [0.4, 2, 1.1, 0.5]
    grouped, plain = Mix(weights, 6, groups), Mix(weights, 6)
    if groups == [3, 1, 4, 2]:
        assert np.array_equal(grouped.owners(5), plain.owners(5)) and grouped.most() == plain.most()
    assert np.array_equal(np.array(grouped.counts(np.arange(99))), np.array(plain.counts(np.arange(99))))


@pytest.mark.parametrize("trial", range(20))
def test_a_group_is_counted_as_if_it_were_one_set(trial: int) -> None:
    random = np.random.default_rng([5, trial])
    sets, units = int(random.integers(3, 7)), int(random.integers(1, 9))
    weights = np.round(random.uniform(0.1, 3, sets), 2)
    groups = random.integers(0, 2, sets)
    groups[:2] = random.permutation(2)
    found = _counted(Mix(weights.tolist(), units, groups.tolist()), sets, 60)
    of_group = [weights[groups == groups[0]].sum().round(2), weights[groups != groups[0]].sum().round(2)]
    expected = _counted(Mix(of_group, units), 2, 60)
    assert np.array_equal(found[:, groups == groups[0]].sum(axis=1), expected[:, 0])
    ideal = np.arange(1, 61)[:, None] * units * weights / weights.sum()
    assert np.abs(found.cumsum(axis=0) - ideal).max() <= sets / 2


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.2, 0.5, 0.3], [1, 1, 1, 1], [0.1, 0.9]])
def test_alternating_steps_are_of_one_set_and_follow_the_weights_evenly(weights: list[float]) -> None:
    found = _counted(build_schedule("alternating", weights, 5), len(weights), 120)
    assert set(found.ravel().tolist()) == {0, 5} and (found.sum(axis=1) == 5).all()
    share = np.array(weights) / sum(weights)
    turns = (found > 0).cumsum(axis=0)
    assert np.abs(turns - np.arange(1, 121)[:, None] * share).max() <= len(weights) / 2
    if weights == [1, 1]:
        assert all(a != b for a, b in itertools.pairwise(found[:, 0].tolist()))


@pytest.mark.parametrize(("weights", "steps"), [([1, 1], 10), ([2, 1], 100), ([0.5, 0.3, 0.2], 77), ([1, 9], 5)])
def test_sequential_sets_follow_one_another(weights: list[float], steps: int) -> None:
    schedule = build_schedule("sequential", weights, 3, steps)
    found = _counted(schedule, len(weights), steps)
    turns = found.argmax(axis=1)
    assert (np.diff(turns) >= 0).all() and (found.max(axis=1) == 3).all()
    share = np.array(weights) / sum(weights)
    assert np.abs(np.bincount(turns, minlength=len(weights)) - steps * share).max() <= len(weights) / 2
    # A run that goes on stays with the last set.
    assert schedule.owners(steps + 1000).tolist() == [len(weights) - 1] * 3
    assert schedule.taken(0, steps + 1000) == schedule.taken(0, steps)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"data\.mixing: sequential: 3 steps are too few for set 2 of the mix; raise"):
        build_schedule("sequential", [1, 0.1, 1], 4, 3)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        build_schedule("sequential", [1, 1], 4)
