import math

import pytest
import torch
from torch import Tensor

from reid_dist.losses.contrastive import contrastive_loss

SCALE = torch.tensor([7.0], dtype=torch.float64).log()


def make(rows: int = 12, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return image, 3 * torch.randn(rows, features, generator=generator, dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


def oracle(image: Tensor, text: Tensor, scale: float, pid: list[int] | None = None) -> float:
    """Loops over anchors and candidates; the pair itself is positive, or every pair of the same identity."""
    rows = len(image)
    total = 0.0
    for anchors, keys in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        for i in range(rows):
            logits = [scale * cosine(anchors[i], keys[j]) for j in range(rows)]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            positives = [j for j in range(rows) if (j == i if pid is None else pid[j] == pid[i])]
            total += sum(log_sum - logits[j] for j in positives) / len(positives)
    return total / (2 * rows)


def test_own_pair_targets_equal_the_double_loop() -> None:
    image, text = make()
    found = contrastive_loss(image, text, SCALE)
    assert found.shape == ()
    assert found.item() == pytest.approx(oracle(image, text, 7.0), rel=1e-12)


@pytest.mark.parametrize("pid", [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [9, 9, 9, 9, 9, 9]])
def test_identity_targets_equal_the_double_loop(pid: list[int]) -> None:
    image, text = make(6)
    found = contrastive_loss(image, text, SCALE, torch.tensor(pid))
    assert found.item() == pytest.approx(oracle(image, text, 7.0, pid), rel=1e-12)


def test_identities_that_all_differ_are_own_pair_targets() -> None:
    image, text = make(6)
    torch.testing.assert_close(
        contrastive_loss(image, text, SCALE, torch.arange(6)), contrastive_loss(image, text, SCALE)
    )


def test_the_length_of_a_feature_does_not_matter() -> None:
    image, text = make()
    torch.testing.assert_close(contrastive_loss(100 * image, text / 7, SCALE), contrastive_loss(image, text, SCALE))


@pytest.mark.parametrize("pid", [None, torch.tensor([0, 0, 1, 2])])
def test_gradient_equals_finite_differences(pid: Tensor | None) -> None:
    image, text = (x.requires_grad_() for x in make(4, 3))
    scale = SCALE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, pid), (image, text, scale))


def test_bf16_features_under_autocast_lose_only_their_own_rounding() -> None:
    """At temperature 0.01 a product in bf16 would be off by several units; here only the inputs are rounded."""
    image, text = (x.bfloat16() for x in make(64, 32))
    expected = contrastive_loss(image.double(), text.double(), torch.tensor([100.0]).log())
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(image, text, torch.tensor([100.0]).log())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_features_get_a_gradient_of_their_own_type() -> None:
    image, text = (x.bfloat16().requires_grad_() for x in make(4, 3))
    contrastive_loss(image, text, SCALE.float()).backward()
    assert image.grad is not None and image.grad.dtype == torch.bfloat16 and bool(image.grad.isfinite().all())


def test_own_pairs_on_several_ranks_equal_one_process(assert_ranks_equal_one_process) -> None:
    assert_ranks_equal_one_process(lambda i, t: contrastive_loss(i, t, SCALE), *make())


def test_identities_spread_unevenly_over_ranks_equal_one_process(assert_ranks_equal_one_process) -> None:
    pid = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 0, 3, 2, 3])
    assert_ranks_equal_one_process(lambda i, t, y: contrastive_loss(i, t, SCALE, y), *make(), pid)


def test_one_identity_alone_has_no_negatives_on_any_rank_and_finite_gradients(assert_ranks_equal_one_process) -> None:
    pid = torch.full((12,), 9)
    assert_ranks_equal_one_process(lambda i, t, y: contrastive_loss(i, t, SCALE, y), *make(), pid)


def test_a_rank_without_negatives_beside_one_that_has_them(assert_ranks_equal_one_process) -> None:
    pid = torch.tensor([4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 4, 5])
    assert_ranks_equal_one_process(lambda i, t, y: contrastive_loss(i, t, SCALE, y), *make(), pid)


@pytest.mark.parametrize("identities", [None, 16])
def test_easy_positives_at_a_low_temperature_keep_their_digits_in_fp32(identities: int | None) -> None:
    """A loss of 1e-5 is the difference of two numbers near 100 where log-sum-exp is taken over positives too."""
    generator = torch.Generator().manual_seed(1)
    owner = torch.arange(32) if identities is None else torch.arange(32) % identities
    image = torch.randn(64, 16, generator=generator)[owner] + 0.01 * torch.randn(32, 16, generator=generator)
    text = image + 0.6 * torch.randn(32, 16, generator=generator)
    pid = None if identities is None else owner
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (image, text, torch.tensor([100.0]).log())]
        loss = contrastive_loss(*leaves, pid)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for exact, found in zip(*results, strict=True):
        assert (found.double() - exact).norm() < 2e-5 * exact.norm()


def _scale_gradient(image: Tensor, text: Tensor) -> Tensor:
    from reid_dist.distributed import mean_over_ranks, rank, world_size

    rows = len(image) // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    scale = SCALE.clone().requires_grad_()
    contrastive_loss(image[own], text[own], scale).backward()
    assert scale.grad is not None
    return mean_over_ranks(scale.grad)


def test_the_temperature_gets_the_gradient_of_the_global_batch(run_ranks) -> None:
    expected = _scale_gradient(*make())
    for found in run_ranks(3, _scale_gradient, *make()):
        torch.testing.assert_close(found, expected)
