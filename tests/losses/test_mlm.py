import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.losses.mlm import NO_LABEL, masked_language_loss


def make(rows: int = 12, length: int = 7, words: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels; the first rows bear more labels, so that ranks have different numbers, one of them none."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, length, words, generator=generator, dtype=torch.float64)
    label = torch.randint(0, words, (rows, length), generator=generator)
    chosen = torch.rand(rows, length, generator=generator) < torch.linspace(0.9, 0.1, rows)[:, None]
    chosen[rows - rows // 4 :] = False
    return logits, label.masked_fill(~chosen, NO_LABEL)


def oracle(logits: Tensor, label: Tensor) -> float:
    losses = []
    for rows, labels in zip(logits.tolist(), label.tolist(), strict=True):
        for line, word in zip(rows, labels, strict=True):
            if word != NO_LABEL:
                losses.append(math.log(math.fsum(map(math.exp, line))) - line[word])
    return math.fsum(losses) / len(losses)


def test_equals_the_loop_over_labelled_positions() -> None:
    logits, label = make()
    found = masked_language_loss(logits, label)
    assert found.shape == ()
    assert found.item() == pytest.approx(oracle(logits, label), rel=1e-13)


def test_positions_without_a_label_have_no_gradient() -> None:
    logits, label = make()
    logits.requires_grad_()
    masked_language_loss(logits, label).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(dim=-1) > 0, label != NO_LABEL)


def test_gradient_equals_finite_differences() -> None:
    logits, label = make(3, 4, 5)
    assert (label != NO_LABEL).any()
    assert torch.autograd.gradcheck(lambda x: masked_language_loss(x, label), (logits.requires_grad_(),))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_label_is_no_loss_and_no_nan(rows: int) -> None:
    logits = torch.randn(rows, 4, 5, requires_grad=True)
    found = masked_language_loss(logits, torch.full((rows, 4), NO_LABEL))
    found.backward()
    assert found.item() == 0.0
    assert logits.grad is not None and bool((logits.grad == 0).all())


def test_ranks_with_different_numbers_of_labels_equal_one_process(assert_ranks_equal_one_process: Callable) -> None:
    """A mean of the ranks' means would give the rank with one label as much weight as the one with twenty."""
    logits, label = make()
    assert (label[-3:] == NO_LABEL).all()  # the last of four ranks has none
    assert_ranks_equal_one_process(masked_language_loss, logits, label, worlds=(2, 3, 4))


def test_bf16_logits_under_autocast_lose_only_their_own_rounding() -> None:
    logits, label = make()
    logits = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_language_loss(logits, label)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracle(logits, label), rel=1e-6)
