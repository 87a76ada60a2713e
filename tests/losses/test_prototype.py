import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.losses.prototype import all_identities_contrast, identity_text_contrast

SCALE = torch.tensor(7.0, dtype=torch.float64).log()
PID = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 0, 3, 2, 3])


def make(rows: int = 12, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, and texts that are one for each identity of PID."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return image, 2 * torch.randn(rows, features, generator=generator, dtype=torch.float64)[PID[:rows]]


def similarity(a: list[float], b: list[float], scale: float | None) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product if scale is None else scale * product / (math.hypot(*a) * math.hypot(*b))


def contrast_by_loops(image: Tensor, text: Tensor, pid: list[int], scale: float | None) -> float:
    """L_i2t + L_t2i, each the mean over anchors of the mean over positives of -log softmax."""
    total, rows = 0.0, len(pid)
    for anchors, keys in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        for i in range(rows):
            exponentials = [math.exp(similarity(anchors[i], keys[a], scale)) for a in range(rows)]
            positives = [p for p in range(rows) if pid[p] == pid[i]]
            for p in positives:
                total -= math.log(exponentials[p] / math.fsum(exponentials)) / len(positives) / rows
    return total


@pytest.mark.parametrize("pid", [PID.tolist(), list(range(12)), [9] * 12])
@pytest.mark.parametrize("scale", [None, 7.0])
def test_contrast_equals_the_double_loop(pid: list[int], scale: float | None) -> None:
    image, text = make()
    found = identity_text_contrast(image, text, torch.tensor(pid), None if scale is None else SCALE)
    assert found.shape == ()
    assert found.item() == pytest.approx(contrast_by_loops(image, text, pid, scale), rel=1e-12)


@pytest.mark.parametrize("log_scale", [None, SCALE])
def test_contrast_on_several_ranks_equals_one_process(
    assert_ranks_equal_one_process: Callable, log_scale: Tensor | None
) -> None:
    assert_ranks_equal_one_process(
        lambda i, t, y: identity_text_contrast(i, t, y, log_scale), *make(), PID, worlds=(2, 4)
    )


@pytest.mark.parametrize("log_scale", [None, SCALE])
def test_gradient_of_the_contrast_equals_finite_differences(log_scale: Tensor | None) -> None:
    image, text = (x.clone().requires_grad_() for x in make(4, 3))
    pid = torch.tensor([0, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda i, t: identity_text_contrast(i, t, pid, log_scale), (image, text))


def test_plain_products_of_clip_size_keep_their_digits_in_fp32() -> None:
    """Lengths of 10 as CLIP's, products of 100: what the published temperature of 1 stands for."""
    generator = torch.Generator().manual_seed(1)
    text = 10 * torch.nn.functional.normalize(torch.randn(61, 16, generator=generator)[torch.arange(61) % 16], dim=1)
    image = text + 3 * torch.randn(61, 16, generator=generator)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (image, text)]
        loss = identity_text_contrast(*leaves, torch.arange(61) % 16)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for exact, found in zip(*results, strict=True):
        assert (found.double() - exact).norm() < 3e-5 * exact.norm()


def all_by_loops(image: Tensor, text: Tensor, label: list[int], scale: float | None, smoothing: float) -> float:
    total = 0.0
    for v, y in zip(image.tolist(), label, strict=True):
        exponentials = [math.exp(similarity(v, t, scale)) for t in text.tolist()]
        for c, value in enumerate(exponentials):
            q = (1 - smoothing) * (c == y) + smoothing / len(text)
            total -= q * math.log(value / math.fsum(exponentials)) / len(label)
    return total


@pytest.mark.parametrize("scale", [None, 7.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_identities_equal_the_double_loop(scale: float | None, smoothing: float) -> None:
    image, text = make()[0], make(9, seed=1)[0]
    found = all_identities_contrast(image, text, PID, None if scale is None else SCALE, smoothing)
    assert found.item() == pytest.approx(all_by_loops(image, text, PID.tolist(), scale, smoothing), rel=1e-12)


@pytest.mark.parametrize("log_scale", [None, SCALE])
def test_gradient_against_all_identities_equals_finite_differences(log_scale: Tensor | None) -> None:
    image, text = make(4, 3)[0].requires_grad_(), make(5, 3, seed=1)[0]
    label = torch.tensor([0, 4, 1, 1])
    assert torch.autograd.gradcheck(lambda i: all_identities_contrast(i, text, label, log_scale), (image,))


def test_all_identities_on_several_ranks_equal_one_process(assert_ranks_equal_one_process: Callable) -> None:
    text = make(9, seed=1)[0]
    assert_ranks_equal_one_process(
        lambda i, y: all_identities_contrast(i, text, y, SCALE), make()[0], PID, worlds=(2, 4)
    )


@pytest.mark.parametrize("log_scale", [None, torch.tensor(100.0).log()])
def test_bf16_features_under_autocast_lose_only_their_own_rounding(log_scale: Tensor | None) -> None:
    image, text = (x.bfloat16() for x in make(12, 32))
    with torch.autocast("cpu", torch.bfloat16):
        contrast = identity_text_contrast(image, text, PID, log_scale)
        everyone = all_identities_contrast(image, text, PID, log_scale)
    wide = (image.double(), text.double(), PID, log_scale)
    assert contrast.dtype == everyone.dtype == torch.float32
    assert contrast.item() == pytest.approx(identity_text_contrast(*wide).item(), rel=1e-5)
    assert everyone.item() == pytest.approx(all_identities_contrast(*wide).item(), rel=1e-5)
