"""Sharded class centres beside `nn.Linear` and torch's optimizers, on 1, 2 and 4 ranks."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import all_gather_ragged, rank, world_size
from reid_dist.losses.sharded_identity import sharded_identity_loss
from reid_dist.models.row_optimizer import RowOptimizer
from reid_dist.models.sharded_classifier import ShardedClassifier, class_range

CLASSES, FEATURES, ROWS, PARTS, STEPS = 41, 7, 8, 2, 5
ADAMW = RowOptimizer("adamw", 0.02, 0.1, (0.9, 0.98))
OPTIMIZERS = [ADAMW, RowOptimizer("adam", 0.02, 0.01), RowOptimizer("sgd", 0.5, 0.01)]
FACTORS = (0.3, 1.0, 0.9, 0.5, 0.1)


def make_batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Features and labels of the global batch."""
    generator = torch.Generator().manual_seed(10 * step + part)
    feature = torch.randn(ROWS, FEATURES, generator=generator)
    return feature, torch.randint(CLASSES, (ROWS,), generator=generator)


def own(x: Tensor) -> Tensor:
    return x.chunk(world_size())[rank()]


def whole(x: Tensor) -> Tensor:
    return torch.cat(all_gather_ragged(x))


def train(rate: float, optimizer: RowOptimizer, max_norm: float, dtype: torch.dtype, large: bool = False) -> Any:
    """Some steps of two micro-batches on this rank: losses, feature gradients, all centres after each step, digest."""
    scale = 30.0 if large else 1.0
    classifier = ShardedClassifier(CLASSES, FEATURES, optimizer, rate=rate, seed=3, max_norm=max_norm, dtype=dtype)
    losses, gradients, centres = [], [], [whole(classifier.weight_SD)]
    for step in range(STEPS):
        batches = [make_batch(step, part) for part in range(PARTS)]
        classifier.begin(torch.cat([own(label) for _, label in batches]))
        classifier.factor = FACTORS[step]
        for feature, label in batches:
            feature_BD = own(scale * feature).to(dtype).requires_grad_()
            weight_SD, class_S = classifier.centres(own(label))
            loss = sharded_identity_loss(feature_BD, own(label), weight_SD, class_S)
            (loss / PARTS).backward()
            assert feature_BD.grad is not None
            losses.append(loss.detach())
            gradients.append(feature_BD.grad / world_size())
        classifier.step()
        centres.append(whole(classifier.weight_SD))
    return torch.stack(losses), torch.cat(gradients, dim=1), torch.stack(centres), classifier.digest()


def dense(
    optimizer: RowOptimizer, max_norm: float, first: Tensor, large: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one weight and torch's optimizer, in float64."""
    scale = 30.0 if large else 1.0
    weight = first.double().clone().requires_grad_()
    if optimizer.name == "sgd":
        torchs: torch.optim.Optimizer = torch.optim.SGD(
            [weight], optimizer.lr, optimizer.momentum, weight_decay=optimizer.weight_decay
        )
    else:
        kind = torch.optim.Adam if optimizer.name == "adam" else torch.optim.AdamW
        torchs = kind([weight], optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay)
    losses, gradients, centres = [], [], [weight.detach().clone()]
    for step in range(STEPS):
        torchs.zero_grad()
        torchs.param_groups[0]["lr"] = optimizer.lr * FACTORS[step]
        for part in range(PARTS):
            feature, label = make_batch(step, part)
            feature = (scale * feature).double().requires_grad_()
            loss = F.cross_entropy(feature @ weight.T, label, label_smoothing=0.1)
            (loss / PARTS).backward()
            assert feature.grad is not None
            losses.append(loss.detach())
            gradients.append(feature.grad)
        if max_norm:
            torch.nn.utils.clip_grad_norm_([weight], max_norm)
        torchs.step()
        centres.append(weight.detach().clone())
    return torch.stack(losses), torch.cat(gradients, dim=1), torch.stack(centres)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def train_all(cases: list[tuple[Any, ...]]) -> list[Any]:
    return [train(*case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_at_rate_1_it_is_the_dense_classifier(world: int, run_ranks: Callable) -> None:
    cases = list(itertools.product(OPTIMIZERS, (0.0, 0.05), (False, True)))
    ranks = run_ranks(world, train_all, [(1.0, *case[:2], torch.float32, case[2]) for case in cases])
    for case, *found in zip(cases, *ranks, strict=True):
        losses, gradients, centres = dense(*case[:2], found[0][2][0], case[2])
        assert close(torch.stack([x[0] for x in found]).mean(0), losses, 1e-5), case
        assert close(torch.cat([x[1] for x in found]), gradients, 1e-5), case
        for step in range(1, STEPS + 1):
            assert close(found[0][2][step], centres[step], 1e-5), case
            assert not close(centres[step], centres[step - 1], 1e-3)  # it does train


def test_several_ranks_equal_one(run_ranks: Callable) -> None:
    cases = [(rate, ADAMW, max_norm, torch.float64) for rate in (1.0, 0.3, 1e-9) for max_norm in (0.0, 0.05)]
    (alone,) = run_ranks(1, train_all, cases)
    for world in (2, 4):
        for case, expected, *found in zip(cases, alone, *run_ranks(world, train_all, cases), strict=True):
            assert close(torch.stack([x[0] for x in found]).mean(0), expected[0], 1e-12), case
            assert close(torch.cat([x[1] for x in found]), expected[1], 1e-11), case
            assert all(close(centres, expected[2], 1e-11) for _, _, centres, _ in found), case


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.name)
def test_a_sample_trains_its_centres_and_leaves_the_others_to_the_bit(optimizer: RowOptimizer) -> None:
    """Each centre is a parameter with an optimizer of its own, stepped when it is counted."""
    classifier = ShardedClassifier(CLASSES, FEATURES, optimizer, rate=0.3, dtype=torch.float64)
    centres = [row.clone().requires_grad_() for row in classifier.weight_SD]
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    moments: dict[str, Any] = {"momentum": 0.9} if optimizer.name == "sgd" else {"betas": optimizer.betas}
    optimizers = [
        kinds[optimizer.name]([row], optimizer.lr, weight_decay=optimizer.weight_decay, **moments) for row in centres
    ]
    seen = set()
    for step in range(STEPS):
        feature, label = make_batch(step, 0)
        feature = feature.double()
        before = classifier.weight_SD.clone()
        classifier.begin(label)
        weight_SD, class_S = classifier.centres(label)
        counted = class_S.tolist()
        assert set(label.tolist()) <= set(counted) and len(counted) < CLASSES
        sharded_identity_loss(feature, label, weight_SD, class_S).backward()
        classifier.step()
        rest = [c for c in range(CLASSES) if c not in counted]
        assert classifier.weight_SD[rest].equal(before[rest])
        logits = feature @ torch.stack([centres[c] for c in counted]).T
        place = torch.tensor([counted.index(c) for c in label.tolist()])
        for row in centres:
            row.grad = None
        F.cross_entropy(logits, place, label_smoothing=0.1).backward()
        for c in counted:
            optimizers[c].step()
        seen |= set(counted)
        torch.testing.assert_close(
            classifier.weight_SD, torch.stack([row.detach() for row in centres]), rtol=1e-10, atol=1e-13
        )
    assert len(seen) > 0.6 * CLASSES


def test_samples_are_of_the_rate_and_differ_between_steps_and_seeds() -> None:
    classifier = ShardedClassifier(20_000, 1, ADAMW, rate=0.1, seed=1)
    labels = torch.tensor([5, 5, 19_999])
    samples = []
    for _ in range(4):
        _, class_S = classifier.centres(labels)
        assert {5, 19_999} <= set(class_S.tolist())
        assert class_S.equal(class_S.sort().values)
        assert len(class_S) == pytest.approx(2000, abs=5 * 42.5)  # standard deviations
        samples.append(set(class_S.tolist()))
        classifier.step()
    for one, other in itertools.pairwise(samples):
        assert len(one & other) == pytest.approx(200, abs=5 * 14)  # independent
    other_seed = ShardedClassifier(20_000, 1, ADAMW, rate=0.1, seed=2)
    _, class_S = other_seed.centres(labels)
    assert len(samples[0] & set(class_S.tolist())) == pytest.approx(200, abs=5 * 14)


def test_the_negatives_sum_is_the_rate_times_the_whole_on_average() -> None:
    """What the docstring says of the estimate."""
    torch.manual_seed(0)
    classifier = ShardedClassifier(500, 4, ADAMW, rate=0.2)
    logits_C = classifier.weight_SD.normal_() @ torch.randn(4)
    label = torch.tensor([7])
    negatives = (torch.arange(500) != 7) * logits_C.exp()
    sums = []
    for classifier.steps in range(2000):
        classifier.begin(label)
        _, class_S = classifier.centres(label)
        sums.append(negatives[class_S].sum())
    found, deviation = torch.stack(sums).mean(), (0.2 * 0.8 * negatives.square().sum()).sqrt()
    assert abs(found - 0.2 * negatives.sum()) < 4 * deviation / 2000**0.5
    assert torch.stack(sums).std() == pytest.approx(float(deviation), rel=0.1)


def skipped_and_repeated() -> dict[str, Any]:
    """A step that the engine skips, between two that it does not."""
    classifier = ShardedClassifier(CLASSES, FEATURES, ADAMW, rate=0.3)
    found: dict[str, Any] = {"digests": [int(classifier.digest())], "samples": []}
    for step, updated in enumerate((True, False, True)):
        feature, label = make_batch(0, 0)
        classifier.begin(own(label))
        weight_SD, class_S = classifier.centres(own(label))
        found["samples"].append(whole(class_S).tolist())
        sharded_identity_loss(own(feature), own(label), weight_SD, class_S).backward()
        if updated:
            classifier.step()
        else:
            classifier.discard()
        found["digests"].append(int(classifier.digest()))
        assert classifier.leaf is None, step
    return found


def test_a_skipped_step_changes_nothing(run_ranks: Callable) -> None:
    expected = skipped_and_repeated()
    start, first, second, third = expected["digests"]
    assert len({start, first, third}) == 3 and second == first
    assert expected["samples"][0] != expected["samples"][1] == expected["samples"][2]
    for found in run_ranks(4, skipped_and_repeated):
        assert found["samples"] == expected["samples"]
        assert found["digests"][0] == start  # the rest is rounded differently


def first_centres(classes: int) -> tuple[Tensor, Tensor, int]:
    classifier = ShardedClassifier(classes, 5, ADAMW, seed=4)
    return whole(classifier.weight_SD), classifier.digest(), classifier.nbytes


@pytest.mark.parametrize("classes", [3, 2049, 5000])
def test_every_number_of_ranks_draws_the_same_centres(classes: int, run_ranks: Callable) -> None:
    expected, digest, nbytes = first_centres(classes)
    assert expected.shape == (classes, 5)
    for found in (*run_ranks(2, first_centres, classes), *run_ranks(4, first_centres, classes)):
        assert found[0].equal(expected) and found[1] == digest
        assert found[2] < nbytes
    assert nbytes == classes * (3 * 5 * 4 + 4)
    if classes > 1000:
        assert expected.std() == pytest.approx(0.001, rel=0.05)
        assert len(expected.unique()) > 0.99 * expected.numel()  # no block twice


def test_the_digest_sees_every_bit_and_place() -> None:
    classifier = ShardedClassifier(30, 4, ADAMW)
    digests = {int(classifier.digest())}
    classifier.weight_SD[[3, 4]] = classifier.weight_SD[[4, 3]]
    digests.add(int(classifier.digest()))
    for change in (
        lambda: classifier.weight_SD[29, 3].mul_(1 + 2e-7),
        lambda: classifier.moments[0][0, 0].add_(1e-30),
        lambda: classifier.moments[1][0, 0].add_(1e-30),
        lambda: classifier.steps_S[7].add_(1),
    ):
        change()
        digests.add(int(classifier.digest()))
    classifier.steps += 1
    digests.add(int(classifier.digest()))
    assert len(digests) == 7


@pytest.mark.parametrize("classes", [1, 2, 7, 41, 100])
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 64])
def test_every_class_is_in_one_shard(classes: int, shards: int) -> None:
    ranges = [class_range(classes, shard, shards) for shard in range(shards)]
    assert [c for first, end in ranges for c in range(first, end)] == list(range(classes))
    assert max(end - first for first, end in ranges) - min(end - first for first, end in ranges) <= 1


def test_without_gradients_the_centres_decay_as_dense_ones_with_zero_gradients() -> None:
    classifier = ShardedClassifier(9, 4, ADAMW)
    before = classifier.weight_SD.clone()
    classifier.step()
    assert classifier.weight_SD.equal(before) and classifier.steps == 0  # no step had begun
    classifier.begin(torch.tensor([1]))
    classifier.step()
    torch.testing.assert_close(classifier.weight_SD, before * (1 - 0.02 * 0.1))


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.5}, {"classes": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"classes": 5, "rate": 1.0, **wrong}
    with pytest.raises(ValueError, match="wants at least one"):
        ShardedClassifier(settings["classes"], 4, ADAMW, rate=settings["rate"])


def test_bytes_are_a_share_of_the_dense_ones() -> None:
    classifier = ShardedClassifier(1000, 16, ADAMW)
    dense_bytes = 4 * 1000 * 16 * 4  # weight, gradient, two moments
    assert classifier.bytes_on(1) == dense_bytes + 4 * 1000
    assert classifier.bytes_on(4) == classifier.bytes_on(1) // 4
    sampled = ShardedClassifier(1000, 16, ADAMW, rate=0.1)
    assert sampled.bytes_on(1) == pytest.approx(3.2 / 4 * dense_bytes + 4 * 1000)
