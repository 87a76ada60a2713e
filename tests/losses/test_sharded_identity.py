"""The sharded identity loss beside the dense one: `F.cross_entropy` of all logits, in one process."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import mean_over_ranks, rank, world_size
from reid_dist.losses.sharded_identity import sharded_identity_loss
from reid_dist.models.sharded_classifier import class_range

ROWS, FEATURES = 12, 7


def problem(classes: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    feature = scale * torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, FEATURES, generator=generator, dtype=torch.float64)
    label = torch.randint(classes, (ROWS,), generator=generator)
    label[1] = label[0]  # two rows of one class
    return feature.to(dtype), weight.to(dtype), label


def dense(feature: Tensor, weight: Tensor, label: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients with respect to features and weights."""
    feature, weight = feature.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = F.cross_entropy(feature @ weight.T, label, label_smoothing=smoothing)
    loss.backward()
    assert feature.grad is not None and weight.grad is not None
    return loss.detach(), feature.grad, weight.grad


def on_this_rank(
    feature: Tensor, weight: Tensor, label: Tensor, smoothing: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the global batch, this rank's rows of the feature gradient, its centres' gradient."""
    rows = ROWS // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    first, end = class_range(len(weight), rank(), world_size())
    class_S = torch.arange(first, end)
    if counted is not None:
        class_S = class_S[counted[first:end]]
    feature, weight = feature[own].clone().requires_grad_(), weight[class_S].clone().requires_grad_()
    loss = sharded_identity_loss(feature, label[own], weight, class_S, smoothing)
    loss.backward()
    assert feature.grad is not None and weight.grad is not None
    return mean_over_ranks(loss), feature.grad / world_size(), weight.grad / world_size()


def put_together(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    losses, features, weights = zip(*found, strict=True)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=0)
    return losses[0], torch.cat(features), torch.cat(weights)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("classes", [37, 3, 1])  # not divisible, and less than ranks
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_all_classes_equal_the_dense_loss(world: int, classes: int, smoothing: float, run_ranks: Callable) -> None:
    expected = dense(*problem(classes), smoothing)
    found = put_together(run_ranks(world, on_this_rank, *problem(classes), smoothing))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])  # 30: logits beyond what fp32 can exponentiate
def test_fp32_is_within_a_hundred_thousandth_of_float64(world: int, scale: float, run_ranks: Callable) -> None:
    feature, weight, label = problem(1001, torch.float32, scale)
    expected = dense(feature.double(), weight.double(), label, 0.1)
    for a, b in zip(put_together(run_ranks(world, on_this_rank, feature, weight, label, 0.1)), expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sample_is_the_dense_loss_of_its_classes(world: int, run_ranks: Callable) -> None:
    """Also the smoothing: spread over what is counted. One rank may count nothing."""
    feature, weight, label = problem(37)
    counted = torch.rand(37, generator=torch.Generator().manual_seed(1)) < 0.3
    counted[label] = True
    counted[class_range(37, 1, 4)[0] : class_range(37, 1, 4)[1]] = False
    label = torch.where(counted[label], label, counted.nonzero()[0])
    place = counted.cumsum(0) - 1
    expected = dense(feature, weight[counted], place[label], 0.1)
    found = put_together(run_ranks(world, on_this_rank, feature, weight, label, 0.1, counted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    feature, weight, label = problem(5)
    torch.autograd.gradcheck(
        lambda f, w: sharded_identity_loss(f, label, w, torch.arange(5), 0.1),
        (feature.requires_grad_(), weight.requires_grad_()),
    )


def weighted_by_rank(feature: Tensor, weight: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, end = class_range(len(weight), rank(), world_size())
    rows = ROWS // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    feature, weight = feature[own].clone().requires_grad_(), weight[first:end].clone().requires_grad_()
    loss = (rank() + 1) * sharded_identity_loss(feature, label[own], weight, torch.arange(first, end))
    loss.backward()
    assert feature.grad is not None and weight.grad is not None
    return sum_of(loss), feature.grad, weight.grad


def sum_of(loss: Tensor) -> Tensor:
    return mean_over_ranks(loss) * world_size()


def test_each_rank_s_own_upstream_gradient_reaches_every_shard(run_ranks: Callable) -> None:
    feature, weight, label = problem(9)
    leaves = [feature.clone().requires_grad_(), weight.clone().requires_grad_()]
    losses = F.cross_entropy(leaves[0] @ leaves[1].T, label, label_smoothing=0.1, reduction="none").view(2, -1).mean(1)
    (losses[0] + 2 * losses[1]).backward()
    _, feature_gradient, weight_gradient = put_together(run_ranks(2, weighted_by_rank, feature, weight, label))
    torch.testing.assert_close(feature_gradient, leaves[0].grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight_gradient, leaves[1].grad, rtol=1e-11, atol=1e-13)


def test_a_second_backward_through_the_same_graph_gives_the_same(run_ranks: Callable) -> None:
    feature, weight, label = problem(9)
    feature.requires_grad_()
    loss = sharded_identity_loss(feature, label, weight.requires_grad_(), torch.arange(9))
    first = torch.autograd.grad(loss, (feature, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (feature, weight))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_autocast_rounds_nothing() -> None:
    feature, weight, label = problem(50, torch.float32)
    expected = sharded_identity_loss(feature, label, weight, torch.arange(50))
    leaf = feature.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = sharded_identity_loss(leaf, label, weight.requires_grad_(), torch.arange(50))
        found.backward()
    assert found.equal(expected)
    assert leaf.grad is not None
    _, feature_gradient, weight_gradient = dense(feature.double(), weight.detach().double(), label, 0.1)
    assert (leaf.grad - feature_gradient).norm() < 1e-6 * feature_gradient.norm()
    assert weight.grad is not None and (weight.grad - weight_gradient).norm() < 1e-6 * weight_gradient.norm()


def test_half_precision_features_meet_exact_centres() -> None:
    feature, weight, label = problem(50, torch.float32)
    half = feature.bfloat16().requires_grad_()
    loss = sharded_identity_loss(half, label, weight, torch.arange(50))
    loss.backward()
    expected, _, _ = dense(half.detach().float(), weight, label, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_a_label_that_nobody_counts_is_an_infinite_loss() -> None:
    """Which the trainer refuses; silence would train with a wrong target."""
    feature, weight, label = problem(9)
    kept = torch.tensor([c for c in range(9) if c != label[0]])
    assert sharded_identity_loss(feature, label, weight[kept], kept) == torch.inf
