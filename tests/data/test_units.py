"""Identities: K distinct images each, of other cameras first, and spare ones for those that cannot be read."""

from collections import Counter

import numpy as np
import pytest

from reid_dist.data.units import Identities, Samples, places_in_runs


def _ordered(keys: np.ndarray, camid: np.ndarray, members: list[int]) -> list[int]:
    """Plain form of the rule: take by random order, always from the cameras that were taken least often."""
    taken: Counter[int] = Counter()
    left, found = sorted(members, key=lambda each: keys[each]), []
    while left:
        least = min(taken[int(camid[each])] for each in left)
        chosen = next(each for each in left if taken[int(camid[each])] == least)
        left.remove(chosen)
        found.append(chosen)
        taken[int(camid[chosen])] += 1
    return found


def _set(seed: int, images: int, first: int = 0) -> tuple[Identities, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 12, 20)
    pid = random.permutation(np.repeat(np.arange(20) * 3 + 1, sizes))
    camid = random.integers(-1, 4, len(pid))
    keys = random.integers(0, 2**63, len(pid)).astype(np.uint64)
    return Identities(pid, camid, images, first), pid, camid, keys


@pytest.mark.parametrize("images", [1, 2, 4, 7])
def test_images_are_distinct_and_of_other_cameras_first(images: int) -> None:
    identities, pid, camid, keys = _set(images, images, first=100)
    assert len(identities) == 20
    chosen = np.array([4, 0, 19, 7, 3])
    rows = identities.rows(chosen, keys)
    assert rows.shape == (5, images) and rows.dtype == np.int64
    for row, number in zip(rows - 100, chosen, strict=True):
        members = np.flatnonzero(pid == number * 3 + 1).tolist()
        order = _ordered(keys, camid, members)
        assert row.tolist() == [order[k % len(order)] for k in range(images)]
        cameras = {int(camid[each]) for each in members}
        assert len(set(camid[row].tolist())) == min(len(cameras), images)
        assert len(set(row.tolist())) == min(len(members), images)


def test_choice_of_one_identity_does_not_depend_on_the_others() -> None:
    identities, _, _, keys = _set(0, 4)
    together = identities.rows(np.arange(20), keys)
    alone = [identities.rows(np.array([number]), keys)[0].tolist() for number in range(20)]
    assert together.tolist() == alone


def test_every_image_may_come_first_and_all_are_seen() -> None:
    pid, camid = np.zeros(6, int), np.array([0, 0, 0, 0, 1, 2])
    identities, random = Identities(pid, camid, 2), np.random.default_rng(0)
    rows = np.concatenate(
        [identities.rows(np.array([0]), random.integers(0, 2**63, 6).astype(np.uint64)) for _ in range(600)]
    )
    assert np.bincount(rows[:, 0]).min() > 60
    assert (camid[rows[:, 0]] != camid[rows[:, 1]]).all()


@pytest.mark.parametrize("images", [1, 3, 4])
def test_spares_are_unused_images_first_and_never_strangers(images: int) -> None:
    identities, pid, _, keys = _set(5, images)
    everyone = np.arange(20)
    rows, others = identities.rows(everyone, keys), identities.others(everyone, keys)
    assert others.shape == (20, images, identities.own_spares)
    assert (pid[others] == pid[rows][:, :, None]).all()
    for row, other in zip(rows, others, strict=True):
        members = set(np.flatnonzero(pid == pid[row[0]]).tolist())
        unused = members - set(row.tolist())
        for spares in other:
            assert set(spares[: len(unused)].tolist()) == unused
            assert set(spares.tolist()) >= unused
        if len(unused) >= images:  # rows that are bad together get different images
            assert len({int(spares[0]) for spares in other}) == images


def test_samples_are_their_own_units() -> None:
    samples = Samples(5, first=10)
    nothing = np.empty(0, np.uint64)
    assert len(samples) == 5
    assert samples.rows(np.array([3, 0]), nothing).tolist() == [[13], [10]]
    assert samples.others(np.array([3, 0]), nothing).shape == (2, 1, 0)


def test_places_in_runs() -> None:
    assert places_in_runs(np.array([3, 3, 3, 1, 1, 3])).tolist() == [0, 1, 2, 0, 1, 0]
    assert places_in_runs(np.array([0, 0, 0, 0]), np.array([1, 1, 2, 2])).tolist() == [0, 1, 0, 1]
    assert places_in_runs(np.array([], int)).tolist() == []
