import pytest
import torch
from torch import nn

from reid_dist.models.linear import new_linear, redraw


def test_weights_have_the_deviation_of_the_features_out_and_no_bias() -> None:
    torch.manual_seed(0)
    linear = new_linear(700, 300)
    assert float(linear.weight.detach().std()) == pytest.approx((2 / 300) ** 0.5, rel=0.01)
    assert abs(float(linear.weight.detach().mean())) < 1e-3 and not linear.bias.any()


def test_a_generator_decides_the_draw_whatever_was_drawn_before() -> None:
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed + len(drawn))
        linear = nn.Linear(3, 4)
        redraw(linear, torch.Generator().manual_seed(seed))
        drawn.append(linear.weight.detach().clone())
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_shapes_alone_are_left_alone() -> None:
    with torch.device("meta"):
        assert new_linear(3, 4).weight.is_meta


def test_a_map_without_bias_is_drawn_too() -> None:
    linear = nn.Linear(3, 4, bias=False)
    before = linear.weight.detach().clone()
    redraw(linear)
    assert linear.bias is None and not linear.weight.equal(before)
