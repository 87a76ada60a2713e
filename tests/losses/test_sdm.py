import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.losses.sdm import sdm_loss

SCALE = torch.tensor(7.0, dtype=torch.float64).log()
PID = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 0, 3, 2, 3])


def make(rows: int = 12, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return image, 3 * torch.randn(rows, features, generator=generator, dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms


def oracle(image: Tensor, text: Tensor, scale: float, pid: list[int], epsilon: float = 1e-8) -> float:
    """Card A1 with loops: for each anchor sum_j p (log p - log(q + epsilon)), the mean of each direction, added."""
    rows, total = len(pid), 0.0
    for anchors, keys in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        for i in range(rows):
            logits = [scale * cosine(anchors[i], keys[j]) for j in range(rows)]
            peak = max(logits)
            log_sum = peak + math.log(math.fsum(math.exp(logit - peak) for logit in logits))
            for j in range(rows):
                log_p, q = logits[j] - log_sum, (pid[i] == pid[j]) / pid.count(pid[i])
                total += math.exp(log_p) * (log_p - math.log(q + epsilon)) / rows
    return total


@pytest.mark.parametrize("pid", [PID.tolist(), list(range(12)), [9] * 12])
@pytest.mark.parametrize("temperature", [0.14, 0.02, 0.01])
def test_equals_the_double_loop(pid: list[int], temperature: float) -> None:
    image, text = make()
    log_scale = torch.tensor(-math.log(temperature), dtype=torch.float64)
    found = sdm_loss(image, text, log_scale, torch.tensor(pid))
    assert found.shape == ()
    assert found.item() == pytest.approx(oracle(image, text, 1 / temperature, pid), rel=1e-11)


def test_one_row_is_its_own_positive() -> None:
    """p = q = 1: only epsilon is left."""
    found = sdm_loss(*make(1), SCALE, torch.tensor([4]), epsilon=1e-3)
    assert found.item() == pytest.approx(-2 * math.log(1 + 1e-3), rel=1e-12)


def test_no_rows_are_no_loss_and_no_nan() -> None:
    image, text = (x.requires_grad_() for x in make(0))
    found = sdm_loss(image, text, SCALE, torch.zeros(0, dtype=torch.int64))
    found.backward()
    assert found.item() == 0.0
    assert image.grad is not None


def test_mass_on_a_wrong_identity_costs_the_logarithm_of_epsilon() -> None:
    image = torch.eye(2, dtype=torch.float64)
    swapped = image.flip(0)
    found = sdm_loss(image, swapped, torch.tensor(1000.0).log(), torch.arange(2), epsilon=1e-6)
    assert found.item() == pytest.approx(-2 * math.log(1e-6), rel=1e-9)


def test_the_length_of_a_feature_does_not_matter() -> None:
    image, text = make()
    torch.testing.assert_close(sdm_loss(100 * image, text / 7, SCALE, PID), sdm_loss(image, text, SCALE, PID))


@pytest.mark.parametrize("pid", [torch.tensor([0, 0, 1, 2]), torch.arange(4), torch.zeros(4, dtype=torch.int64)])
def test_gradient_equals_finite_differences(pid: Tensor) -> None:
    image, text = (x.requires_grad_() for x in make(4, 3))
    scale = SCALE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t, s: sdm_loss(i, t, s, pid), (image, text, scale))


@pytest.mark.parametrize("pid", [PID, torch.arange(12), torch.full((12,), 9)], ids=["uneven", "all differ", "one"])
def test_several_ranks_equal_one_process(assert_ranks_equal_one_process: Callable, pid: Tensor) -> None:
    assert_ranks_equal_one_process(lambda i, t, y: sdm_loss(i, t, SCALE, y), *make(), pid)


def test_four_ranks_at_temperature_002_equal_one_process(assert_ranks_equal_one_process: Callable) -> None:
    scale = torch.tensor(50.0, dtype=torch.float64).log()
    assert_ranks_equal_one_process(lambda i, t, y: sdm_loss(i, t, scale, y), *make(), PID, worlds=(4,))


def _scale_gradient(image: Tensor, text: Tensor, pid: Tensor) -> Tensor:
    from reid_dist.distributed import mean_over_ranks, rank, world_size

    rows = len(image) // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    scale = SCALE.clone().requires_grad_()
    sdm_loss(image[own], text[own], scale, pid[own]).backward()
    assert scale.grad is not None
    return mean_over_ranks(scale.grad)


def test_the_temperature_gets_the_gradient_of_the_global_batch(run_ranks: Callable) -> None:
    expected = _scale_gradient(*make(), PID)
    for found in run_ranks(3, _scale_gradient, *make(), PID):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("identities", [1, 16, 61])
@pytest.mark.parametrize("temperature", [0.02, 0.01])
def test_fp32_keeps_its_digits_at_low_temperatures(identities: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    owner = torch.arange(61) % identities
    image = torch.randn(61, 16, generator=generator)[owner] + 0.01 * torch.randn(61, 16, generator=generator)
    text = image + 0.6 * torch.randn(61, 16, generator=generator)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (image, text, torch.tensor(1 / temperature).log())]
        loss = sdm_loss(*leaves, owner)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    assert results[1][0].dtype == torch.float32
    for exact, found in zip(*results, strict=True):
        assert (found.double() - exact).norm() < 3e-5 * exact.norm()


def test_bf16_features_under_autocast_lose_only_their_own_rounding() -> None:
    image, text = (x.bfloat16() for x in make(24, 32))
    pid = torch.arange(24) % 7
    scale = torch.tensor(50.0).log()
    expected = sdm_loss(image.double(), text.double(), scale, pid)
    with torch.autocast("cpu", torch.bfloat16):
        found = sdm_loss(image.requires_grad_(), text, scale, pid)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert image.grad is not None and image.grad.dtype == torch.bfloat16 and bool(image.grad.isfinite().all())
