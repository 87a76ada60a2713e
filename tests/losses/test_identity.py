import math

import pytest
import torch
from torch import Tensor

from reid_dist.losses.identity import identity_loss


def oracle(logits: list[list[float]], labels: list[int], smoothing: float) -> float:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_sum = math.log(sum(math.exp(logit) for logit in row))
        for c, logit in enumerate(row):
            target = (1 - smoothing) * (c == label) + smoothing / len(row)
            total -= target * (logit - log_sum)
    return total / len(logits)


def make(rows: int = 12, identities: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, identities, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, identities, (rows,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_equals_the_double_loop(smoothing: float) -> None:
    logits, labels = make()
    expected = oracle(logits.tolist(), labels.tolist(), smoothing)
    assert identity_loss(logits, labels, smoothing).item() == pytest.approx(expected, rel=1e-12)


def test_smoothing_spreads_over_all_identities_the_right_one_included() -> None:
    """A certain, right answer costs eps (C - 1) / C times the margin; with eps / (C - 1) it would cost eps times it."""
    logits = torch.zeros(1, 4, dtype=torch.float64)
    logits[0, 2] = 40.0
    assert identity_loss(logits, torch.tensor([2]), 0.1).item() == pytest.approx(0.1 * 3 / 4 * 40, rel=1e-9)


def test_gradient_equals_finite_differences() -> None:
    logits, labels = make(4, 3)
    assert torch.autograd.gradcheck(lambda x: identity_loss(x, labels), (logits.requires_grad_(),))


def test_bf16_logits_under_autocast_are_summed_in_fp32() -> None:
    logits, labels = make(32, 500)
    logits = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = identity_loss(logits, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(identity_loss(logits.double(), labels).item(), rel=1e-6)


def test_several_ranks_equal_one_process(assert_ranks_equal_one_process) -> None:
    assert_ranks_equal_one_process(identity_loss, *make())
