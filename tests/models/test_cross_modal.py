import math

import pytest
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.models.cross_modal import CrossModalEncoder
from tests.stages.irra_reference import cross_modal_logits

ROWS, WORDS, PATCHES, VOCABULARY = 3, 7, 5, 11


def make(features: int, depth: int) -> CrossModalEncoder:
    """With biases and gains that are not 0 and 1, so that none of them can be forgotten."""
    torch.manual_seed(0)
    encoder = CrossModalEncoder(features, depth, VOCABULARY).double()
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder


def make_tokens(features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(ROWS, WORDS, features, generator=generator, dtype=torch.float64)
    return text, torch.randn(ROWS, PATCHES, features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("features", "depth"), [(10, 1), (64, 2), (128, 4)])
def test_equals_the_formulas(features: int, depth: int) -> None:
    encoder = make(features, depth).train()
    text, image = make_tokens(features)
    found = encoder(text, image)
    assert found.shape == (ROWS, WORDS, VOCABULARY)
    parameters = dict(encoder.named_parameters())
    torch.testing.assert_close(found, cross_modal_logits(parameters, "", text, image), rtol=1e-11, atol=1e-11)


def test_evaluation_gives_what_training_gives() -> None:
    encoder, tokens = make(128, 2), make_tokens(128)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(*tokens), encoder.train()(*tokens), rtol=1e-11, atol=1e-11)


def test_gradients_reach_both_modalities_and_every_parameter() -> None:
    encoder = make(64, 2)
    text, image = (x.requires_grad_() for x in make_tokens(64))
    encoder(text, image).square().sum().backward()
    for x in (text, image, *encoder.parameters()):
        assert x.grad is not None and bool(x.grad.any())


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    features, depth = 256, 4
    encoder = CrossModalEncoder(features, depth, 500)
    whole, output, inner = features**-0.5, (2 * depth * features) ** -0.5, (2 * features) ** -0.5
    expected = {"cross_attention.in_proj_weight": whole, "cross_attention.out_proj.weight": output}
    for block in range(depth):
        expected |= {
            f"cross_blocks.{block}.attn.in_proj_weight": whole,
            f"cross_blocks.{block}.attn.out_proj.weight": output,
            f"cross_blocks.{block}.mlp.c_fc.weight": inner,
            f"cross_blocks.{block}.mlp.c_proj.weight": output,
        }
    expected |= {"mlm_head.0.weight": inner, "mlm_head.3.weight": output}
    matrices = {name: p.detach() for name, p in encoder.named_parameters() if p.dim() == 2}
    assert matrices.keys() == expected.keys()
    for name, weight in matrices.items():
        assert float(weight.std()) == pytest.approx(expected[name], rel=0.02), name
        assert abs(float(weight.mean())) < 5 * expected[name] / weight.numel() ** 0.5, name
        # Normal, not uniform, which has a fourth moment of 1.8.
        assert float((weight / weight.std()).pow(4).mean()) == pytest.approx(3, abs=0.2), name


def test_norms_and_biases_start_as_torch_has_them() -> None:
    torch.manual_seed(0)
    encoder = CrossModalEncoder(64, 2, 50)
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 2:
            continue
        value = parameter.detach()
        if name.endswith("weight"):
            assert bool((value == 1).all()), name
        elif "attn" in name or "attention" in name or "norm" in name or "ln_" in name or name == "mlm_head.2.bias":
            assert not value.any(), name
        else:  # Linear: uniform within 1 / sqrt(fan-in)
            fan_in = 4 * 64 if "c_proj" in name else 64
            assert 0.5 / math.sqrt(fan_in) < float(value.abs().max()) <= 1 / math.sqrt(fan_in), name


def test_only_what_is_published_to_learn_faster_is_named_for_it() -> None:
    """IRRA's rule for `cross` spares the norms around the attention; a recipe must be able to tell them apart."""
    names = [name for name, _ in CrossModalEncoder(64, 1, 5).named_parameters()]
    rest = [name for name in names if not name.startswith(("cross_attention.", "cross_blocks.", "mlm_head."))]
    assert rest == [f"norm_{at}.{kind}" for at in ("text", "image", "out") for kind in ("weight", "bias")]


def test_features_that_are_not_whole_heads_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.mlm_weight: .* 64 features, into which the model's 200"):
        CrossModalEncoder(200, 1, 5)
    assert CrossModalEncoder(192, 1, 5).cross_attention.num_heads == 3
