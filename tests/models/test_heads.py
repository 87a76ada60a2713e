from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reid_dist.distributed import rank, world_size
from reid_dist.models.heads import BNNeck, IdentityClassifier, LinearClassifier, NormalizedClassifier

FEATURES = 5
ROWS = 12


def make_batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Sorted, so that the ranks see very different statistics.
    return [
        torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64).sort(dim=0).values for _ in range(count)
    ]


def make_neck() -> BNNeck:
    neck = BNNeck(FEATURES).double()
    neck.weight.data = torch.linspace(0.5, 1.5, FEATURES, dtype=torch.float64)
    return neck


def make_reference() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(FEATURES).double()
    norm.weight.data = torch.linspace(0.5, 1.5, FEATURES, dtype=torch.float64)
    return norm


def run_module(module: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """Two training steps on this rank's rows: outputs, input gradients, and what the module keeps."""
    rows = ROWS // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    outputs, gradients = [], []
    for batch in batches:
        x = batch[own].clone().requires_grad_()
        y = module(x)
        weights = torch.arange(ROWS * FEATURES, dtype=torch.float64).view(ROWS, FEATURES).cos()
        (y * weights[own]).sum().backward()
        assert x.grad is not None
        outputs.append(y.detach())
        gradients.append(x.grad)
    weight = module.weight
    assert isinstance(weight, nn.Parameter) and weight.grad is not None
    kept = [module.running_mean, module.running_var, weight.grad]
    return {"outputs": outputs, "gradients": gradients, "kept": kept}


def _neck_on_this_rank(batches: list[Tensor]) -> dict[str, list[Tensor]]:
    return run_module(make_neck().train(), batches)


def assert_equal_to_batch_norm(results: list[dict[str, list[Tensor]]]) -> None:
    expected = run_module(make_reference().train(), make_batches())
    for key in ("outputs", "gradients"):
        for step in range(2):
            found = torch.cat([result[key][step] for result in results])
            torch.testing.assert_close(found, expected[key][step], rtol=1e-10, atol=1e-12)
    mean, variance, weight_gradient = expected["kept"]
    for result in results:
        torch.testing.assert_close(result["kept"][0], mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result["kept"][1], variance, rtol=1e-12, atol=1e-14)
    summed = torch.stack([result["kept"][2] for result in results]).sum(dim=0)
    torch.testing.assert_close(summed, weight_gradient, rtol=1e-10, atol=1e-12)


def test_one_rank_equals_batch_norm_of_torch() -> None:
    assert_equal_to_batch_norm([_neck_on_this_rank(make_batches())])


def test_three_ranks_equal_batch_norm_of_the_concatenated_batch(run_ranks: Callable) -> None:
    assert_equal_to_batch_norm(run_ranks(3, _neck_on_this_rank, make_batches()))


def test_evaluation_uses_the_running_statistics_and_moves_nothing() -> None:
    neck, norm = make_neck(), make_reference()
    for batch in make_batches():
        neck.train()(batch)
        norm.train()(batch)
    batch = make_batches(3)[2]
    before = neck.running_mean.clone()
    torch.testing.assert_close(neck.eval()(batch), norm.eval()(batch))
    assert neck.running_mean.equal(before)


def _evaluate_one_row_on_rank_0(batch: Tensor) -> Tensor:
    """Evaluation must not be a collective: only rank 0 calls it."""
    return make_neck().eval()(batch[:1]) if rank() == 0 else batch[:1]


def test_evaluation_needs_no_other_rank(run_ranks: Callable) -> None:
    found = run_ranks(2, _evaluate_one_row_on_rank_0, make_batches()[0])[0]
    torch.testing.assert_close(found, make_reference().eval()(make_batches()[0][:1]))


def test_there_is_no_bias() -> None:
    assert [name for name, _ in BNNeck(FEATURES).named_parameters()] == ["weight"]
    assert [name for name, _ in IdentityClassifier(FEATURES, 3).named_parameters()] == [
        "neck.weight",
        "classifier.weight",
    ]


def test_bf16_features_under_autocast_are_normalised_in_fp32() -> None:
    """A mean of 256 has no digits left for a spread of 1 in bf16 sums."""
    x = (torch.arange(64).view(64, 1) % 2 * 2 + 256).bfloat16()
    neck = BNNeck(1).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = neck(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float().abs(), torch.ones(64, 1))
    torch.testing.assert_close(neck.running_mean, torch.tensor([25.7]))


def test_classifier_is_linear_in_the_normalised_features() -> None:
    torch.manual_seed(0)
    head = IdentityClassifier(FEATURES, 3).double().train()
    batch = make_batches()[0]
    expected = nn.BatchNorm1d(FEATURES).double()(batch) @ head.classifier.weight.T
    torch.testing.assert_close(head(batch), expected)
    assert 0.0005 < float(head.classifier.weight.detach().std()) < 0.002


def test_the_linear_head_of_irra_starts_small_and_without_a_bias() -> None:
    torch.manual_seed(0)
    head = LinearClassifier(64, 300)
    feature = 5 * torch.randn(7, 64)
    parameters = dict(head.named_parameters())
    weight, bias = parameters["classifier.weight"].detach(), parameters["classifier.bias"].detach()
    assert float(weight.std()) == pytest.approx(0.001, rel=0.03) and bool((bias == 0).all())
    nn.init.normal_(head.classifier.bias)
    torch.testing.assert_close(head(feature), feature @ weight.T + head.classifier.bias)


def test_the_head_of_textreid_measures_along_unit_vectors_features_as_they_come() -> None:
    torch.manual_seed(0)
    head = NormalizedClassifier(FEATURES, 3).double()
    feature = make_batches()[0]
    logits = head(feature).tolist()
    for row, x in zip(logits, feature.tolist(), strict=True):
        for found, w in zip(row, head.weight.tolist(), strict=True):
            expected = sum(a * b for a, b in zip(x, w, strict=True)) / sum(b * b for b in w) ** 0.5
            assert found == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(head(3 * feature), 3 * head(feature))
    assert torch.autograd.gradcheck(head, (feature[:2].clone().requires_grad_(),))


def test_the_head_of_textreid_starts_as_xavier() -> None:
    torch.manual_seed(0)
    weight = NormalizedClassifier(256, 1000).weight.detach()
    bound = (6 / (256 + 1000)) ** 0.5
    assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
