import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.losses.alignment import alignment_loss

PID = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 0, 3, 2, 3])


def make(rows: int = 12, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return image, 3 * torch.randn(rows, features, generator=generator, dtype=torch.float64)


def oracle(image: Tensor, text: Tensor, pid: list[int]) -> float:
    """methods.md 3.5: (2 / B) { sum_pos log[1 + exp(-10 (S - 0.6))] + sum_neg log[1 + exp(40 (S - 0.4))] }."""
    total = 0.0
    for i, v in enumerate(image.tolist()):
        for j, t in enumerate(text.tolist()):
            cosine = math.fsum(a * b for a, b in zip(v, t, strict=True)) / (math.hypot(*v) * math.hypot(*t))
            exponent = -10 * (cosine - 0.6) if pid[i] == pid[j] else 40 * (cosine - 0.4)
            total += math.log(1 + math.exp(exponent))
    return 2 * total / len(pid)


@pytest.mark.parametrize("pid", [PID.tolist(), list(range(12)), [9] * 12])
def test_equals_the_double_loop(pid: list[int]) -> None:
    image, text = make()
    found = alignment_loss(image, text, torch.tensor(pid))
    assert found.shape == ()
    assert found.item() == pytest.approx(oracle(image, text, pid), rel=1e-12)


def test_a_pair_in_numbers() -> None:
    """One pair of cosine 1; two of them that are orthogonal to each other."""
    one = torch.tensor([[2.0, 0.0]])
    assert alignment_loss(one, one, torch.tensor([3])).item() == pytest.approx(2 * math.log1p(math.exp(-4)), rel=1e-6)
    two = torch.eye(2)
    expected = (2 / 2) * (2 * math.log1p(math.exp(-4)) + 2 * math.log1p(math.exp(-16)))
    assert alignment_loss(two, two, torch.tensor([3, 4])).item() == pytest.approx(expected, rel=1e-6)


def test_no_rows_are_no_loss_and_no_nan() -> None:
    image, text = (x.requires_grad_() for x in make(0))
    found = alignment_loss(image, text, torch.zeros(0, dtype=torch.int64))
    found.backward()
    assert found.item() == 0.0


def test_gradient_equals_finite_differences() -> None:
    image, text = (x.requires_grad_() for x in make(5, 3))
    pid = torch.tensor([0, 0, 1, 2, 1])
    assert torch.autograd.gradcheck(lambda i, t: alignment_loss(i, t, pid), (image, text))


@pytest.mark.parametrize("pid", [PID, torch.arange(12), torch.full((12,), 9)], ids=["uneven", "all differ", "one"])
def test_several_ranks_equal_one_process(assert_ranks_equal_one_process: Callable, pid: Tensor) -> None:
    assert_ranks_equal_one_process(alignment_loss, *make(), pid, worlds=(2, 3, 4))


def test_bf16_features_under_autocast_lose_only_their_own_rounding() -> None:
    image, text = (x.bfloat16() for x in make(64, 32))
    pid = torch.arange(64) % 9
    expected = alignment_loss(image.double(), text.double(), pid)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(image, text, pid)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_hopeless_negative_has_a_finite_gradient() -> None:
    """exp(40 (1 - 0.4)) overflows nothing; the slope there is 40."""
    same = torch.ones(2, 3, requires_grad=True)
    other = torch.ones(2, 3)
    alignment_loss(same, other, torch.tensor([0, 1])).backward()
    assert same.grad is not None and bool(same.grad.isfinite().all())
