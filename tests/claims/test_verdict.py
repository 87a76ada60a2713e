"""Verdicts against the rule, spelled out: sign in 4 of 5 seeds, mean beyond 2 standard errors."""

import itertools
import statistics

import pytest
import torch

from reid_dist.claims.verdict import combine, judge

VERDICTS = ("supported", "contradicted", "within noise")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.2, 0.8, 1.1, 0.9], "supported"),
        ([-1.0, -1.2, -0.8, -1.1, -0.9], "contradicted"),
        ([1.0, 1.2, 0.8, 1.1, -0.1], "supported"),  # 4 of 5, 0.8 +- 0.23
        ([1.0, 1.2, 0.8, -0.1, -0.1], "within noise"),  # 3 of 5
        ([9.0, 0.1, 0.1, 0.1, 0.1], "within noise"),  # 5 of 5, but 1.9 +- 1.8
        ([1.0, 1.0, 1.0, 1.0, 0.0], "supported"),  # 0 has no sign: 4 of 5
        ([1.0, 1.0, 1.0, 0.0, 0.0], "within noise"),
        ([0.0] * 5, "within noise"),
        ([1.0] * 5, "supported"),  # no scatter at all
        ([1.0, 1.1, 0.9], "within noise"),  # 3 seeds cannot show 4
        ([1.0, 1.1, 0.9, 1.0], "supported"),
        ([1.0, 1.1, 0.9, -0.1], "within noise"),
        ([5.0], "within noise"),
        ([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, -0.1, -0.1, -0.1], "within noise"),  # 7 of 10
        ([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.0, -0.1, -0.1], "supported"),  # 8 of 10
    ],
)
def test_cases_at_the_edge_of_the_rule(values: list[float], expected: str) -> None:
    assert judge(values).verdict == expected


def test_random_differences_against_the_rule_in_other_words() -> None:
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(500):
        shift = float(torch.randn((), generator=generator))
        values = (torch.randn(5, generator=generator, dtype=torch.float64) + shift).tolist()
        judged = judge(values)
        error = statistics.pvariance(values) ** 0.5 / 4**0.5  # of the mean of 5: sqrt(sum of squares / 4 / 5)
        assert judged.error == pytest.approx(error)
        positive = sum(value > 0 for value in values)
        lower, upper = statistics.mean(values) - 2 * error, statistics.mean(values) + 2 * error
        expected = "within noise"
        if positive >= 4 and lower > 0:
            expected = "supported"
        if positive <= 1 and upper < 0:
            expected = "contradicted"
        assert judged.verdict == expected
        found.add(expected)
        # The other way round, the opposite.
        opposite = {"supported": "contradicted", "contradicted": "supported"}.get(expected, expected)
        assert judge([-value for value in values]).verdict == opposite
    assert found == set(VERDICTS)


def test_the_difference_tells_what_it_rests_on() -> None:
    judged = judge([1.0, 2.0, -0.5])
    assert judged.values == (1.0, 2.0, -0.5)
    assert judged.mean == pytest.approx(2.5 / 3)
    assert judged.agreeing == 2
    assert judge([3.0]).error is None


def test_nothing_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="no differences"):
        judge([])


def test_all_claims_need_all_and_any_claims_need_one() -> None:
    for verdicts in itertools.product(VERDICTS, repeat=3):
        every, some = combine(verdicts, "all"), combine(verdicts, "any")
        assert (every == "supported") == all(v == "supported" for v in verdicts)
        assert (every == "contradicted") == any(v == "contradicted" for v in verdicts)
        assert (some == "supported") == any(v == "supported" for v in verdicts)
        assert (some == "contradicted") == all(v == "contradicted" for v in verdicts)
        assert {every, some} <= set(VERDICTS)
    assert combine([], "all") is None
