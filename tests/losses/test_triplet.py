import math

import pytest
import torch
from torch import Tensor

from reid_dist.losses.triplet import batch_hard_triplet_loss


def make(rows: int = 12, features: int = 4) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def oracle(feature: Tensor, pid: list[int], margin: float | None) -> float:
    rows = feature.tolist()
    total = 0.0
    for i, anchor in enumerate(rows):
        positives = [math.dist(anchor, rows[j]) for j in range(len(rows)) if pid[j] == pid[i]]  # itself included
        negatives = [math.dist(anchor, rows[j]) for j in range(len(rows)) if pid[j] != pid[i]]
        if negatives:
            excess = max(positives) - min(negatives)
            total += math.log1p(math.exp(excess)) if margin is None else max(0.0, margin + excess)
    return total / len(rows)


@pytest.mark.parametrize("margin", [0.3, 0.0, None])
@pytest.mark.parametrize(
    "pid", [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 3], list(range(12))]
)
def test_equals_the_double_loop(pid: list[int], margin: float | None) -> None:
    found = batch_hard_triplet_loss(make(), torch.tensor(pid), margin)
    assert found.shape == ()
    assert found.item() == pytest.approx(oracle(make(), pid, margin), rel=1e-12)


def test_hand_made_case_uses_plain_distances_and_the_hardest_of_each() -> None:
    """On a line: anchor 0 has positives at 1 and 3 and negatives at 2 and 10: margin + 3 - 2."""
    feature = torch.tensor([[0.0], [1.0], [3.0], [2.0], [10.0]])
    pid = torch.tensor([0, 0, 0, 1, 1])
    per_anchor = [0.5 + 3 - 2, 0.5 + 2 - 1, 0.5 + 3 - 1, 0.5 + 8 - 1, 0.5 + 8 - 7]
    assert batch_hard_triplet_loss(feature, pid, 0.5).item() == pytest.approx(sum(per_anchor) / 5)


def test_an_anchor_alone_of_its_identity_is_its_own_positive() -> None:
    feature = torch.tensor([[0.0], [0.1], [0.2]])
    found = batch_hard_triplet_loss(feature, torch.tensor([0, 1, 2]), 0.3)
    assert found.item() == pytest.approx(0.3 - 0.1)


@pytest.mark.parametrize("margin", [0.3, None])
def test_without_any_negative_loss_and_gradient_are_zero(margin: float | None) -> None:
    feature = (1e6 * make(4)).requires_grad_()  # farther apart than any number that would stand for infinity
    loss = batch_hard_triplet_loss(feature, torch.tensor([5, 5, 5, 5]), margin)
    loss.backward()
    assert loss.item() == 0
    assert feature.grad is not None and not feature.grad.any()


def test_equal_images_give_a_finite_gradient() -> None:
    """The same image twice in a batch: the root of a zero distance must not give nan."""
    feature = make(6)
    feature[1] = feature[0]
    feature[3] = feature[0]
    feature.requires_grad_()
    batch_hard_triplet_loss(feature, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert feature.grad is not None and bool(feature.grad.isfinite().all())


@pytest.mark.parametrize("margin", [2.0, None])
def test_gradient_equals_finite_differences(margin: float | None) -> None:
    pid = torch.tensor([0, 0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda x: batch_hard_triplet_loss(x, pid, margin), (make(5).requires_grad_(),))


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    feature = (make(16, 8) + 1000).float()
    pid = torch.arange(4).repeat_interleave(4)
    expected = batch_hard_triplet_loss(feature.double(), pid)
    assert batch_hard_triplet_loss(feature, pid).item() == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_features_under_autocast_are_compared_in_fp32() -> None:
    feature = make(16, 8).bfloat16()
    pid = torch.arange(4).repeat_interleave(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = batch_hard_triplet_loss(feature, pid)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(batch_hard_triplet_loss(feature.double(), pid).item(), rel=1e-5)


@pytest.mark.parametrize("pid", [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 0, 3]])
def test_hardest_candidates_on_other_ranks_are_found(pid: list[int], assert_ranks_equal_one_process) -> None:
    assert_ranks_equal_one_process(batch_hard_triplet_loss, make(), torch.tensor(pid))
