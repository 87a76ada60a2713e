import pytest
import torch
from torch import Tensor

from reid_dist.models.row_conv import ResidualBlock, RowConvTower, StandardizedConv2d


def effective_filters(conv: StandardizedConv2d) -> Tensor:
    """The filters that the convolution really applies, read off its response to every unit input."""
    fan_in = conv.weight[0].numel()
    units = torch.eye(fan_in).view(fan_in, *conv.weight.shape[1:])
    # No padding: each unit input gives one output pixel.
    bare = StandardizedConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, bias=False)
    bare.weight = conv.weight
    return bare(units).flatten(1).T


def test_filters_have_zero_mean_and_unit_norm_whatever_the_weights_are() -> None:
    torch.manual_seed(0)
    conv = StandardizedConv2d(4, 6, 3, 1, 1, bias=False)
    conv.weight.data.mul_(30).add_(5)
    filters = effective_filters(conv)
    assert filters.shape == (6, 36)
    torch.testing.assert_close(filters.mean(dim=1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(filters.norm(dim=1), torch.ones(6), atol=1e-4, rtol=0)


def test_scale_and_shift_of_a_filter_do_not_matter() -> None:
    torch.manual_seed(0)
    conv = StandardizedConv2d(4, 6, 3, 2, 1, bias=False)
    x = torch.randn(2, 4, 8, 8)
    before = conv(x)
    conv.weight.data.mul_(3).add_(0.7)
    torch.testing.assert_close(conv(x), before, atol=1e-4, rtol=1e-4)


def test_a_constant_filter_gives_zero_and_a_finite_gradient() -> None:
    conv = StandardizedConv2d(2, 1, 3, bias=False)
    conv.weight.data.fill_(0.5)
    y = conv(torch.randn(1, 2, 4, 4))
    y.sum().backward()
    assert not y.any()
    assert conv.weight.grad is not None and bool(conv.weight.grad.isfinite().all())


@pytest.mark.parametrize(("stride", "width"), [(1, 8), (2, 8), (1, 16), (2, 16)])
def test_blocks_keep_or_halve_the_resolution(stride: int, width: int) -> None:
    block = ResidualBlock(8, width, stride, 2)
    assert block(torch.randn(2, 8, 6, 4)).shape == (2, width, 6 // stride, 4 // stride)


def test_features_do_not_depend_on_the_other_images_of_the_batch() -> None:
    torch.manual_seed(0)
    tower = RowConvTower(12, (8, 16), 2, 4).train()
    image = torch.randn(6, 3, 32, 16)
    together = tower(image)
    # Not bit for bit: a convolution may sum in another order for another batch size.
    torch.testing.assert_close(torch.cat([tower(image[i : i + 1]) for i in range(6)]), together, atol=1e-6, rtol=1e-5)
    other = image.clone()
    other[1:] *= 50
    torch.testing.assert_close(tower(other)[0], together[0], atol=0, rtol=0)


def test_checkpointing_changes_neither_features_nor_gradients() -> None:
    torch.manual_seed(0)
    tower = RowConvTower(12, (8, 16), 2, 4)
    image = torch.randn(2, 3, 32, 16)
    results = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        tower.zero_grad()
        features = tower(image)
        features.square().sum().backward()
        results.append([features.detach(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + len(list(tower.parameters()))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=0, rtol=0)


def test_checkpointing_really_recomputes_the_blocks() -> None:
    tower = RowConvTower(12, (8, 16), 2, 4)
    tower.set_grad_checkpointing()
    calls: list[int] = []
    # A pre-hook: the recomputation stops as soon as it has what backward needs, before the hooks after a forward.
    tower.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tower(torch.randn(1, 3, 32, 16)).sum().backward()
    assert len(calls) == 2


def test_each_stripe_of_rows_has_its_own_place_in_the_projection() -> None:
    """Turning the picture upside down changes the features; with one pooled stripe it would hardly."""
    torch.manual_seed(0)
    x = torch.rand(1, 16, 8, 4)
    tower = RowConvTower(12, (8, 16), 2, 4)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, (tower.rows, 1)).squeeze(-1)
    expected = torch.stack([x[:, :, 2 * r : 2 * r + 2].mean(dim=(2, 3)) for r in range(4)], dim=-1)
    torch.testing.assert_close(pooled, expected)
    tower.blocks = torch.nn.ModuleList()
    tower.stem, tower.stem_norm = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    features = tower(x)
    stripes = torch.nn.functional.silu(x).view(1, 16, 4, 2, 4).mean(dim=(3, 4))
    torch.testing.assert_close(features, stripes.flatten(1) @ tower.projection.weight.T + tower.projection.bias)


def test_tokens_are_the_features_and_what_each_stripe_adds_to_them() -> None:
    torch.manual_seed(0)
    tower = RowConvTower(6, widths=(8, 16), groups=2, rows=4).double()
    image = torch.randn(3, 3, 32, 16, dtype=torch.float64)
    output = tower(image, details=True)
    assert output.features.equal(tower(image)) and output.tokens.shape == (3, 1 + 4, 6)
    assert output.tokens[:, 0].equal(output.features)
    torch.testing.assert_close(output.tokens[:, 1:].sum(1) + tower.projection.bias, output.features)
    # A stripe that is zero adds nothing, and no other changes.
    shown = torch.tensor([1.0, 0, 1, 1]).repeat_interleave(2)[:, None]
    tower.blocks[-1].register_forward_hook(lambda module, inputs, x_BCHW: x_BCHW * shown)
    without = tower(image, details=True).tokens
    assert not without[:, 2].any()
    assert without[:, [1, 3, 4]].equal(output.tokens[:, [1, 3, 4]])


def test_a_second_projection_begins_as_the_first() -> None:
    tower, image = RowConvTower(6, widths=(8, 16), groups=2, rows=4, dual_token=True), torch.randn(2, 3, 32, 16)
    output = tower(image, details=True)
    assert output.i2i_features.equal(output.features)
    output.i2i_features.sum().backward()
    assert tower.projection.weight.grad is None and bool(tower.projection_i2i.weight.grad.any())
    assert RowConvTower(6, widths=(8, 16), groups=2, rows=4)(image, details=True).i2i_features is None
