"""Equal numbers of captions on all ranks and micro-batches, beside a count of what plans really give."""

import re

import numpy as np
import pytest

from reid_dist.data.captioned_rows import require_equal_rows
from reid_dist.data.mixing import Mix
from reid_dist.data.sampler import local_batch_size
from reid_dist.errors import UserError


def _equal(captioned: list[bool], weights: list[float], size: int, ranks: int, accumulation: int, images: int) -> bool:
    """By making the first steps of a plan and cutting them into the pieces of ranks and micro-batches."""
    rows, units = size // (ranks * accumulation), size // images
    mix = Mix(weights, units, captioned)
    steps = -(-4 * rows * images // size) + 1
    owners = np.concatenate([mix.owners(step) for step in range(steps)]).repeat(images)
    has = np.array(captioned)[owners].reshape(-1, rows).sum(axis=1)
    return bool((has == has[0]).all())


@pytest.mark.parametrize("trial", range(300))
def test_what_is_refused_and_what_is_named(trial: int) -> None:
    random = np.random.default_rng([1, trial])
    ranks, accumulation, images = (int(each) for each in random.integers(1, [6, 4, 5]))
    size = int(np.lcm(ranks * accumulation, accumulation * images) * random.integers(1, 9))
    sets = int(random.integers(2, 5))
    captioned = [True, False, *(random.random(sets - 2) < 0.5).tolist()]
    random.shuffle(captioned)
    weights = random.integers(1, 4, sets) * random.choice([1, 0.5])
    arguments = (size, ranks, accumulation, images)
    if _equal(captioned, weights.tolist(), *arguments):
        require_equal_rows(captioned, weights.tolist(), *arguments)
        return
    with pytest.raises(UserError, match=r"^data\.weights: captioned sets have .*data\.mixing: alternating$") as caught:
        require_equal_rows(captioned, weights.tolist(), *arguments)
    assert "\n" not in str(caught.value)
    for named in re.findall(r"global_batch_size (\d+)", str(caught.value)):
        local_batch_size(int(named), ranks, accumulation, images)
        assert _equal(captioned, weights.tolist(), int(named), *arguments[1:])
    for part, whole in re.findall(r"give them (\d+)/(\d+)", str(caught.value)):
        share = [int(part), int(whole) - int(part)]
        assert _equal([True, False], share, *arguments) or _equal([False, True], share[::-1], *arguments)


def test_the_nearest_that_work() -> None:
    require_equal_rows([False, True], [1, 1], 128, 8, 2, 4)
    require_equal_rows([True, False, True], [1, 2, 1], 64, 16, 1, 2)  # together, not each captioned set by itself
    with pytest.raises(
        UserError, match=r"0\.3333 of the mix, 10\.67 of the 32 rows .* whole number, in identities of 4"
    ):
        require_equal_rows([False, True], [2, 1], 128, 4, 1, 4)
    with pytest.raises(UserError, match=r"data\.global_batch_size 60 or data\.global_batch_size 72 or .* them 5/16 or"):
        require_equal_rows([False, True], [2, 1], 64, 4)
    # One rank would hold only a captioned identity, the next one only another.
    with pytest.raises(UserError, match=r"nearest that work: data\.global_batch_size 256 or data\.mixing"):
        require_equal_rows([False, True], [1, 1], 64, 32, 1, 4)


def test_sets_without_shares() -> None:
    with pytest.raises(UserError, match=r"a share for each, .* give data\.weights, or data\.mixing: alternating"):
        require_equal_rows([False, True], [], 64, 2)
