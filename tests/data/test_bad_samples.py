"""How many bad samples stop a run."""

import pytest

from reid_dist.data.bad_samples import BadSamples
from reid_dist.errors import UserError


def test_none_is_allowed_by_default() -> None:
    bad = BadSamples()
    bad.add(64, [])
    with pytest.raises(UserError, match=r"^a: broken$"):
        bad.add(64, ["a: broken"])
    assert (bad.seen, bad.count, bad.messages) == (128, 1, ["a: broken"])


def test_a_share_and_ten_more() -> None:
    bad = BadSamples(0.01)
    bad.add(64, ["early"] * 10)
    for _ in range(10):
        bad.add(100, ["later"])
    assert (bad.seen, bad.count, bad.messages) == (1064, 20, ["early", "later"])
    with pytest.raises(
        UserError,
        match=r"21 of 1065 samples read are bad, more than data\.max_bad_fraction 0\.01 allows: early; later; z$",
    ):
        bad.add(1, ["z"])


def test_only_some_are_named() -> None:
    with pytest.raises(UserError, match=r"allows: a; b; c; and others$"):
        BadSamples(0.01).add(20, [*"abcdefghijklmnop"])


def test_a_set_that_is_half_bad_stops_soon() -> None:
    bad = BadSamples(0.05)
    with pytest.raises(UserError):
        for _ in range(2):
            bad.add(16, ["x"] * 8)


def test_only_the_first_names_are_kept() -> None:
    bad = BadSamples(1.0)
    for number in range(300):
        bad.add(3, [f"{number} {k}" for k in range(3)])
    assert bad.count == 900 and len(bad.messages) == 100 and bad.messages[99] == "33 0"


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_not_a_share(fraction: float) -> None:
    with pytest.raises(UserError, match="is not a share; give a number from 0 to 1"):
        BadSamples(fraction)
