import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.losses.sigmoid import sigmoid_loss

SCALE = torch.tensor(10.0, dtype=torch.float64).log()
BIAS = torch.tensor(-3.0, dtype=torch.float64)
IDS = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 0, 3, 2, 3])


def make(rows: int = 12, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return image, 3 * torch.randn(rows, features, generator=generator, dtype=torch.float64)


def oracle(image: Tensor, text: Tensor, ids: list[int], scale: float, bias: float) -> float:
    total = 0.0
    for i, v in enumerate(image.tolist()):
        for j, t in enumerate(text.tolist()):
            cosine = math.fsum(a * b for a, b in zip(v, t, strict=True)) / (math.hypot(*v) * math.hypot(*t))
            sign = 1 if ids[i] == ids[j] else -1
            total -= math.log(1 / (1 + math.exp(-sign * (scale * cosine + bias))))
    return total / len(ids)


@pytest.mark.parametrize("ids", [IDS.tolist(), list(range(12)), [9] * 12])
def test_equals_the_double_loop(ids: list[int]) -> None:
    image, text = make()
    found = sigmoid_loss(image, text, SCALE, BIAS, torch.tensor(ids))
    assert found.shape == ()
    assert found.item() == pytest.approx(oracle(image, text, ids, 10.0, -3.0), rel=1e-12)


def test_without_ids_only_the_own_pair_is_positive() -> None:
    image, text = make()
    found = sigmoid_loss(image, text, SCALE, BIAS)
    assert found.item() == pytest.approx(oracle(image, text, list(range(12)), 10.0, -3.0), rel=1e-12)


def test_no_rows_are_no_loss_and_no_nan() -> None:
    image, text = (x.requires_grad_() for x in make(0))
    found = sigmoid_loss(image, text, SCALE, BIAS)
    found.backward()
    assert found.item() == 0.0


def test_gradient_equals_finite_differences() -> None:
    leaves = [x.clone().requires_grad_() for x in (*make(5, 3), SCALE, BIAS)]
    ids = torch.tensor([0, 0, 1, 2, 1])
    assert torch.autograd.gradcheck(lambda i, t, s, b: sigmoid_loss(i, t, s, b, ids), leaves)


@pytest.mark.parametrize("ids", [None, IDS, torch.full((12,), 9)], ids=["own pair", "uneven", "one"])
def test_several_ranks_equal_one_process(assert_ranks_equal_one_process: Callable, ids: Tensor | None) -> None:
    labels = () if ids is None else (ids,)
    assert_ranks_equal_one_process(
        lambda i, t, *y: sigmoid_loss(i, t, SCALE, BIAS, *y), *make(), *labels, worlds=(2, 3, 4)
    )


def _scalar_gradients(image: Tensor, text: Tensor) -> Tensor:
    from reid_dist.distributed import mean_over_ranks, rank, world_size

    rows = len(image) // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    scalars = [x.clone().requires_grad_() for x in (SCALE, BIAS)]
    sigmoid_loss(image[own], text[own], *scalars).backward()
    return mean_over_ranks(torch.stack([x.grad for x in scalars if x.grad is not None]))


def test_scale_and_bias_get_the_gradient_of_the_global_batch(run_ranks: Callable) -> None:
    expected = _scalar_gradients(*make())
    assert expected.shape == (2,)
    for found in run_ranks(3, _scalar_gradients, *make()):
        torch.testing.assert_close(found, expected)


def test_bf16_features_under_autocast_lose_only_their_own_rounding() -> None:
    image, text = (x.bfloat16() for x in make(64, 32))
    arguments = (torch.tensor(100.0).log(), torch.tensor(-10.0))
    expected = sigmoid_loss(image.double(), text.double(), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = sigmoid_loss(image, text, *arguments)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_ids_of_a_stream_are_told_apart_beyond_32_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)
    scale, bias = torch.tensor([2.0]), torch.tensor([-3.0])
    tar, row = torch.arange(6) // 2, torch.arange(6) % 2
    found = sigmoid_loss(image, text, scale, bias, (tar << 32) + row)
    torch.testing.assert_close(found, sigmoid_loss(image, text, scale, bias))
