"""Plans of shards: complete, bounded, mixed, and the same whatever the order of listing."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain, groupby

import numpy as np
import pytest

from reid_dist.data.exclude import NOTHING, Exclusions
from reid_dist.errors import UserError
from shards.raw import RawSample
from shards.writing import plan as plan_module
from shards.writing.plan import PLANNED_OVERHEAD, Plan, plan_shards


@dataclass(frozen=True)
class _Image:
    name: str
    size: int
    group: str = ""

    def read(self) -> bytes:
        raise AssertionError("a plan reads no images")


def _samples(count: int, seed: int = 0, groups: int = 0) -> list[RawSample]:
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        group = f"g{number * groups // count}" if groups else ""
        image = _Image(str(number), int(rng.integers(1_000, 60_000)), group)
        pid = None if rng.random() < 0.2 else str(rng.integers(count // 7 + 1))
        samples.append(RawSample(image, pid, -1, "train", "train", (), f"{number // 10}/{number:05d}.jpg"))
    return samples


def _plan(samples: list[RawSample], order: str = "shuffled", seed: int = 0, shard_bytes: int = 300_000) -> Plan:
    return plan_shards(samples, "x", NOTHING, order, seed, shard_bytes)  # type: ignore[arg-type]


def _keys(plan: Plan) -> list[list[str]]:
    return [[entry.key for entry in plan.entries_of(shard)] for shard in range(len(plan.shards))]


@pytest.mark.parametrize("order", ["shuffled", "identity"])
@pytest.mark.parametrize("groups", [0, 9])
@pytest.mark.parametrize("count", [1, 2, 50, 701])
def test_every_sample_once_in_bounded_shards(order: str, groups: int, count: int) -> None:
    samples = _samples(count, count, groups)
    plan = _plan(samples, order)
    keys = _keys(plan)
    assert (
        sorted(chain.from_iterable(keys)) == sorted(entry.key for entry in plan.entries) and len(plan.entries) == count
    )
    for shard in range(len(plan.shards)):
        size = sum(entry.raw.image.size + PLANNED_OVERHEAD for entry in plan.entries_of(shard))
        assert len(keys[shard]) == 1 or 0 < size <= 300_000
    assert [plan.name(0), plan.name(123_456)] == ["x-000000.tar", "x-123456.tar"]
    # The listing's order does not decide, the seed does.
    mixed = [samples[number] for number in np.random.default_rng(1).permutation(count)]
    assert _keys(_plan(mixed, order)) == keys
    if count > 10:
        assert _keys(_plan(samples, order, seed=1)) != keys


def test_shuffled_order_is_mixed() -> None:
    plan = _plan(_samples(5_000))
    order = np.concatenate(plan.shards)
    # Of a uniform permutation; the standard error of the correlation is 0.014.
    assert abs(np.corrcoef(order, np.arange(5_000))[0, 1]) < 0.06
    assert (np.abs(np.diff(order)) == 1).mean() < 0.005


def test_groups_are_taken_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a shard come from few groups, and yet neighbours are mixed."""
    monkeypatch.setattr(plan_module, "WINDOW", 400)
    samples = _samples(4_000, groups=40)
    plan = _plan(samples, shard_bytes=3_000_000)
    groups = [[entry.raw.image.group for entry in plan.entries_of(shard)] for shard in range(len(plan.shards))]
    assert len(groups) > 30
    assert max(len(set(each)) for each in groups) <= 8  # a shard of about 90 touches at most two windows of 4 groups
    assert np.mean([a == b for a, b in zip(groups[0], groups[0][1:], strict=False)]) < 0.5
    visits = Counter(group for each in groups for group in set(each))
    assert max(visits.values()) <= 7
    # Groups are not in the order of the source.
    first = [next(iter(each)) for each in groups]
    assert first != sorted(first)


def test_identities_stay_together_and_in_one_shard() -> None:
    plan = _plan(_samples(500), "identity", shard_bytes=2_000_000)
    pids = [[entry.pid("x") for entry in plan.entries_of(shard)] for shard in range(len(plan.shards))]
    flat = list(chain.from_iterable(pids))
    assert len(list(groupby(flat))) == len(set(flat))
    assert sum(len(set(each)) for each in pids) == len(set(flat))  # none is in two shards, as each fits into one
    assert len(plan.shards) > 3


def test_a_large_identity_is_split() -> None:
    samples = [RawSample(_Image(str(n), 50_000), "7", 0, "train", "train", (), f"{n:03d}.jpg") for n in range(40)]
    plan = _plan(samples, "identity", shard_bytes=200_000)
    assert [len(shard) for shard in plan.shards] == [3] * 13 + [1]


def test_exclusion_keeps_keys() -> None:
    """Keys do not depend on what is left out, so that two sets of one tree name the same image alike."""
    samples = [
        RawSample(_Image(name, 10), pid, 0, "train", "train", (), name)
        for name, pid in [("a.b.jpg", "1"), ("a_b.jpg", "2"), ("c.jpg", None), ("d.jpg", None)]
    ]
    full = {entry.raw.source: entry.key for entry in _plan(samples).entries}
    assert full["a_b.jpg"] != full["a.b.jpg"]
    plan = plan_shards(samples, "x", Exclusions(frozenset({"x:1", "x:c", "y:2"})), "shuffled", 0, 1_000)
    assert {entry.raw.source: entry.key for entry in plan.entries} == {
        "a_b.jpg": full["a_b.jpg"],
        "d.jpg": full["d.jpg"],
    }
    assert plan.excluded == 2


def test_double_sources_are_errors() -> None:
    samples = _samples(3)
    with pytest.raises(UserError, match=r"0/00001\.jpg: named twice"):
        _plan([*samples, samples[1]])


def test_names_that_are_not_utf8_are_errors() -> None:
    samples = [*_samples(3), replace(_samples(1)[0], source="a/caf\udce9.jpg")]
    with pytest.raises(UserError, match=r"'a/caf\\udce9\.jpg': the name of the file is not UTF-8; rename it"):
        _plan(samples)
