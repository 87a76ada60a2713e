"""What plans and loaders promise, for hundreds of random sizes: world sizes 1 to 8, workers 0 to 4, any step to resume.

Plans are checked in all combinations; whole loaders with real worker processes in a handful of them.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reid_dist.data.loader import Sampling, TrainLoader
from reid_dist.data.mixing import Mixing
from reid_dist.data.reader import ShardSet
from reid_dist.data.sampler import Plan, Step, micro_batches, occurrences
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import Batch, TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.data.units import Identities, Samples
from reid_dist.errors import UserError

Build = Callable[..., Path]
Random = np.random.Generator
WORLD_SIZES = range(1, 9)
TOKENIZER = WordTokenizer(["picture", "caption", *map(str, range(99))], 8, 128)


def _random(trial: int) -> Random:
    return np.random.default_rng([2024, trial])


def _people(random: Random, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Identities of 1 to 9 images in any order, some without a known camera."""
    pid = random.permutation(np.repeat(np.arange(count), random.integers(1, 10, count)))
    return pid, random.integers(-1, 5, len(pid))


def _joined(steps: list[Step], name: str) -> np.ndarray:
    return np.concatenate([getattr(step, name) for step in steps])


@pytest.mark.parametrize("trial", range(60))
def test_plain_epochs_deliver_every_sample_exactly_once(trial: int) -> None:
    random = _random(trial)
    batch = int(random.integers(1, 70))
    count = int(random.integers(1, 70) if trial % 2 else random.integers(batch, 5 * batch + 1))
    seed, epochs = int(random.integers(2**40)), 4
    plan = Plan([Samples(count)], batch, seed)
    steps = [plan.step(step) for step in range(math.ceil(epochs * count / batch))]
    sample, epoch = _joined(steps, "sample_G"), _joined(steps, "epoch_G")
    for each in range(epochs):
        assert np.array_equal(np.sort(sample[each * count : (each + 1) * count]), np.arange(count))
    assert np.array_equal(epoch, np.arange(len(epoch)) // count)
    for step in steps:
        most = Counter(step.sample_G.tolist()).most_common(1)[0][1]
        assert most == 1 if count >= batch else most <= math.ceil(batch / count) + 1
    _resumes(lambda: Plan([Samples(count)], batch, seed), steps, random)


@pytest.mark.parametrize("trial", range(40))
def test_identity_batches_take_each_identity_once_per_pass(trial: int) -> None:
    random = _random(1000 + trial)
    images, identities = int(random.integers(1, 7)), int(random.integers(1, 17))
    people = int(identities + random.integers(0, 3 * identities))
    pid, camid = _people(random, people)
    seed = int(random.integers(1000))

    def make() -> Plan:
        return Plan([Identities(pid, camid, images)], identities * images, seed)

    plan, passes = make(), 3
    steps = [plan.step(step) for step in range(math.ceil(passes * people / identities))]
    rows = _joined(steps, "sample_G").reshape(-1, images)
    assert (pid[rows] == pid[rows[:, :1]]).all()
    for each in range(passes):
        assert np.array_equal(np.sort(pid[rows[each * people : (each + 1) * people, 0]]), np.arange(people))
    assert np.array_equal(_joined(steps, "epoch_G"), np.arange(len(rows)).repeat(images) // people)
    for step in steps:
        assert len(set(pid[step.sample_G].tolist())) == identities
    for row in rows:
        own = np.flatnonzero(pid == pid[row[0]])
        copies = Counter(row.tolist())
        assert len(copies) == min(images, len(own))
        assert max(copies.values()) - min(copies.values()) <= 1
        # No camera twice while another one has an image that was not taken.
        assert len(set(camid[row].tolist())) == min(images, len(set(camid[own].tolist())))
    _resumes(make, steps, random)


@pytest.mark.parametrize("trial", range(30))
@pytest.mark.parametrize("kind", ["epoch", "identity"])
def test_mixes_keep_exact_shares_and_whole_passes_of_each_set(trial: int, kind: str) -> None:
    random = _random(2000 + trial)
    sets, images = int(random.integers(2, 6)), int(random.integers(1, 4)) if kind == "identity" else 1
    units, weights = int(random.integers(1, 40)), np.round(random.uniform(0.05, 3, sets), 3).tolist()
    seed = int(random.integers(1000))
    pid, camid = [], []
    sizes = random.integers(units, 3 * units + 1, sets)
    for size in sizes:
        people = _people(random, int(size)) if kind == "identity" else (np.arange(size), np.zeros(size, int))
        pid.append(people[0])
        camid.append(people[1])
    first = np.cumsum([0, *map(len, pid)])

    def make() -> Plan:
        each = zip(pid, camid, first, strict=False)
        if kind == "identity":
            return Plan([Identities(p, c, images, int(f)) for p, c, f in each], units * images, seed, weights)
        return Plan([Samples(len(p), int(f)) for p, _, f in each], units, seed, weights)

    plan = make()
    steps = [plan.step(step) for step in range(80)]
    of_set = np.searchsorted(first, _joined(steps, "sample_G"), side="right") - 1
    share = np.array(weights) / sum(weights)
    for stop in range(1, 81):
        taken = np.bincount(of_set[: stop * units * images], minlength=sets) / images
        assert np.abs(taken - stop * units * share).max() <= sets / 2
    for number in range(sets):
        mine = _joined(steps, "sample_G")[of_set == number].reshape(-1, images) - first[number]
        people, size = pid[number][mine[:, 0]], int(sizes[number])
        assert np.array_equal(_joined(steps, "epoch_G")[of_set == number][::images], np.arange(len(mine)) // size)
        for begin in range(0, len(mine) - size + 1, size):
            assert np.array_equal(np.sort(people[begin : begin + size]), np.arange(size))
    union = np.concatenate([number * 1000 + each for number, each in enumerate(pid)])
    for step in steps:
        assert len(set(union[step.sample_G].tolist())) == units
    _resumes(make, steps, random)


@pytest.mark.parametrize("trial", range(30))
@pytest.mark.parametrize("mixing", ["alternating", "sequential"])
def test_sets_in_turn_keep_whole_passes_of_each_set(trial: int, mixing: Mixing) -> None:
    random = _random(5000 + trial)
    sets, images, total = int(random.integers(2, 5)), int(random.integers(1, 4)), 60
    units, weights = int(random.integers(1, 20)), np.round(random.uniform(0.2, 3, sets), 2).tolist()
    people = [_people(random, int(size)) for size in random.integers(units, 3 * units + 1, sets)]
    first = np.cumsum([0, *(len(pid) for pid, _ in people)])
    seed = int(random.integers(1000))

    def make() -> Plan:
        parts = [Identities(pid, camid, images, int(f)) for (pid, camid), f in zip(people, first, strict=False)]
        return Plan(parts, units * images, seed, weights, mixing=mixing, steps=total)

    steps = [make().step(step) for step in range(total)]
    of_step = []
    for step in steps:
        (number,) = set((np.searchsorted(first, step.sample_G, side="right") - 1).tolist())
        of_step.append(number)
        pid = people[number][0][step.sample_G - first[number]]
        assert len(set(pid.tolist())) == units  # also where a pass ends in a step
    taken = np.bincount(of_step, minlength=sets)
    assert np.abs(taken - total * np.array(weights) / sum(weights)).max() <= sets / 2
    if mixing == "sequential":
        assert of_step == sorted(of_step)
    for number, (pid, _) in enumerate(people):
        mine = [step for step, of in zip(steps, of_step, strict=True) if of == number]
        found, size = pid[_joined(mine, "sample_G")[::images] - first[number]], len(set(pid.tolist()))
        assert np.array_equal(_joined(mine, "epoch_G")[::images], np.arange(len(found)) // size)
        for begin in range(0, len(found) - size + 1, size):
            assert np.array_equal(np.sort(found[begin : begin + size]), np.arange(size))
        # The set's own order is that of a run on it alone, wherever its turns are.
        if number == 0:
            alone = Plan([Identities(*people[0], images)], units * images, seed)
            assert np.array_equal(
                _joined(mine, "sample_G"), _joined([alone.step(n) for n in range(len(mine))], "sample_G")
            )
    _resumes(make, steps, random)


def _resumes(make: Callable[[], Plan], steps: list[Step], random: Random) -> None:
    """A plan that begins anywhere, or goes back, gives the steps of one that began at 0."""
    for begin in random.integers(0, len(steps), 3).tolist():
        plan = make()
        for step in range(begin, min(begin + 3, len(steps))):
            again = plan.step(step)
            assert np.array_equal(again.sample_G, steps[step].sample_G)
            assert np.array_equal(again.epoch_G, steps[step].epoch_G)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_global_batches_are_the_same_for_every_world_size(world_size: int) -> None:
    random = _random(3000 + world_size)
    for _ in range(20):
        images = int(random.integers(1, 5))
        accumulation = int(random.integers(1, 4))
        unit = math.lcm(world_size * accumulation, accumulation * images)
        row_G = random.integers(0, 50, unit * int(random.integers(1, 6)))
        repeat_G = occurrences(row_G)
        for values in (row_G, repeat_G):
            ranks = [micro_batches(values, rank, world_size, accumulation, images) for rank in range(world_size)]
            joined = [ranks[rank][a] for a in range(accumulation) for rank in range(world_size)]
            assert len({len(part) for part in joined}) == 1
            assert np.array_equal(np.concatenate(joined), values)
        assert len({*zip(row_G.tolist(), repeat_G.tolist(), strict=True)}) == len(row_G)


@pytest.fixture
def samples(build: Build) -> TrainingSamples:
    """Two sets in shards of one to many samples, with captions to choose from."""
    sets = [
        ShardSet(build("ragged", train=7, shard_bytes=2_000, captions=3)),
        ShardSet(build("one", train=10, shard_bytes=1_000_000)),
    ]
    augment = Augment(pad=2, erase=0.5, jitter=0.2)
    return TrainingSamples(sets, (16, 8), TOKENIZER, augment, mask_probability=0.3)


def _digest(parts: list[Batch]) -> str:
    """Everything in a global batch."""
    digest = hashlib.sha256()
    for name in sorted(parts[0]):
        digest.update(torch.cat([part[name] for part in parts]).numpy().tobytes())
    return digest.hexdigest()


def _digests(
    samples: TrainingSamples, sampling: Sampling, start: int, stop: int, ranks: int, workers: int = 0
) -> list[str]:
    loaders = [TrainLoader(samples, sampling, rank, ranks, workers) for rank in range(ranks)]
    steps = zip(*(loader.steps(start, stop) for loader in loaders), strict=True)
    return [_digest([rank[a] for a in range(sampling.accumulation) for rank in step]) for step in steps]


@pytest.fixture
def partly(build: Build) -> TrainingSamples:
    """A captioned and an uncaptioned set; all pairs of the captioned one are items."""
    sets = [ShardSet(build("bare", train=7, captions=0)), ShardSet(build("told", train=8, captions=3))]
    augment = Augment(pad=2, erase=0.5)
    more: dict[str, Any] = {"allow_uncaptioned": True, "mask_probability": 0.3, "items": "captions"}
    return TrainingSamples(sets, (16, 8), TOKENIZER, augment, **more)


IN_PARTS: list[dict[str, Any]] = [
    {"kind": "epoch", "weights": (1, 1)},
    {"kind": "identity", "images": 2, "weights": (1, 1)},
    {"kind": "epoch", "weights": (1, 2), "mixing": "alternating"},
    {"kind": "identity", "images": 2, "mixing": "alternating"},
    {"kind": "epoch", "mixing": "sequential", "steps": 7},
    {"kind": "identity", "images": 4, "weights": (1, 2), "mixing": "sequential", "steps": 7},
]


@pytest.mark.parametrize("settings", IN_PARTS)
@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (24, 1), (24, 3)])
def test_captions_of_some_rows_do_not_depend_on_world_size_accumulation_and_resume(
    partly: TrainingSamples, settings: dict[str, Any], size: int, accumulation: int
) -> None:
    images, random = settings.get("images", 1), _random(6000 + size)
    if settings["kind"] == "identity" and size // images > 7:
        size, accumulation = 4 * images, accumulation % 3
    if not accumulation:
        return
    alone = _digests(partly, Sampling(size, seed=3, **settings), 0, 7, 1)
    assert len(set(alone)) == 7
    tried = 0
    for ranks in (1, 2, 3, 4):
        sampling = Sampling(size, accumulation=accumulation, seed=3, **settings)
        try:
            loaders = [TrainLoader(partly, sampling, rank, ranks) for rank in range(ranks)]
        except UserError:
            continue  # what is refused, and that the rest is equal: test_captioned_rows.py
        tried += 1
        start = int(random.integers(0, 7))
        assert _digests(partly, sampling, start, 7, ranks) == alone[start:]
        for step in zip(*(loader.steps(start, 7) for loader in loaders), strict=True):
            parts = [part for rank in step for part in rank]
            counts = {len(part["token_BL"]) for part in parts}
            assert len(counts) == 1 and counts == {int(part["captioned_B"].sum()) for part in parts}
            for part in parts:
                has = part["captioned_B"].numpy()
                assert (partly.set_N[part["sample_id_B"].numpy()] == has).all()
    assert tried >= 2


def test_the_mix_is_the_same_with_and_without_text(partly: TrainingSamples) -> None:
    without = TrainingSamples(partly.shards, (16, 8), augment=partly.augment, items="captions")
    for settings in IN_PARTS:
        sampling = Sampling(4 * settings.get("images", 1), seed=1, **settings)
        plans = [TrainLoader(samples, sampling) for samples in (partly, without)]
        for step in range(7):
            assert np.array_equal(*(plan.step_rows(step) for plan in plans))


KINDS: list[dict[str, Any]] = [
    {"kind": "epoch"},
    {"kind": "identity", "images": 4},
    {"kind": "epoch", "weights": (0.7, 0.3)},
    {"kind": "identity", "images": 2, "weights": (1, 2)},
]


@pytest.mark.parametrize("settings", KINDS)
def test_batches_do_not_depend_on_world_size_accumulation_and_resume(
    samples: TrainingSamples, settings: dict[str, Any]
) -> None:
    images, random = settings.get("images", 1), _random(4000)
    for batch, accumulation in ((840 // 60, 1), (840 // 35, 1), (840 // 35, 3), (40, 1), (40, 5)):
        if batch % images or (settings["kind"] == "identity" and batch // images > 7):
            continue
        alone = _digests(samples, Sampling(batch, seed=3, **settings), 0, 6, 1)
        assert len(set(alone)) == 6
        for ranks in WORLD_SIZES:
            if batch % math.lcm(ranks * accumulation, accumulation * images):
                continue
            start = int(random.integers(0, 6))
            sampling = Sampling(batch, accumulation=accumulation, seed=3, **settings)
            assert _digests(samples, sampling, start, 6, ranks) == alone[start:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # the machine has fewer cores
@pytest.mark.parametrize(("workers", "settings"), [*itertools.product((1, 2, 3, 4), KINDS[1:3])])
def test_batches_do_not_depend_on_workers(samples: TrainingSamples, workers: int, settings: dict[str, Any]) -> None:
    sampling = Sampling(16 if "images" in settings else 12, accumulation=workers % 2 + 1, seed=workers, **settings)
    alone = _digests(samples, sampling, 2, 9, 1)
    assert _digests(samples, sampling, 2, 9, 1, workers) == alone
    if workers in (1, 4):
        assert _digests(samples, sampling, 5, 9, 2, 1) == alone[3:]


def _rank_digests(folder: Path, start: int) -> list[Any]:
    """What a rank of a real process group reads: sample numbers and all bytes, with two workers of its own."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    samples = TrainingSamples([ShardSet(folder)], (16, 8), TOKENIZER, Augment(pad=2))
    loader = TrainLoader(samples, Sampling(12, accumulation=2), rank, ranks, workers=2)
    return [[part["image_BCHW"].clone() for part in step] for step in loader.steps(start, 6)]


def test_ranks_in_processes_of_their_own(build: Build, run_ranks: Callable[..., list[Any]]) -> None:
    folder = build("one", train=7)
    samples = TrainingSamples([ShardSet(folder)], (16, 8), TOKENIZER, Augment(pad=2))
    alone = [
        torch.cat([part["image_BCHW"] for part in step]) for step in TrainLoader(samples, Sampling(12)).steps(0, 6)
    ]
    for ranks, start in ((2, 0), (3, 2)):
        steps = zip(*run_ranks(ranks, _rank_digests, folder, start), strict=True)
        for step, expected in zip(steps, alone[start:], strict=True):
            assert torch.equal(torch.cat([rank[a] for a in range(2) for rank in step]), expected)
