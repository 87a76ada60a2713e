import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.evaluation.features import evaluating
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import MAX_LOGIT_SCALE, DualEncoder, TextShape
from tests.models.encoders import TOKENS, build, make_images


@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_checkpointing_changes_nothing(name: str, architectures: dict[str, str]) -> None:
    torch.manual_seed(0)
    encoder = build(architectures[name], (64, 32))
    gradients = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        output = encoder(make_images(64, 32), TOKENS)
        (output.image_features * output.text_features).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=0, rtol=0)


def test_checkpointing_that_the_tower_would_ignore_is_refused(architectures: dict[str, str]) -> None:
    encoder = build(architectures["resnet"], (64, 64))
    encoder.set_grad_checkpointing(False)
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing"):
        encoder.set_grad_checkpointing()


class Identity(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x


def make_plain_encoder(dtype: torch.dtype = torch.float32) -> DualEncoder:
    return DualEncoder(Identity(dtype), Identity(), TextShape(8, 50), 3, (0.5, 0.25, 0.0), (0.5, 0.1, 2.0))


def test_uint8_images_are_normalised_per_channel() -> None:
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    found = make_plain_encoder().encode_image(image).flatten()
    torch.testing.assert_close(found, torch.tensor([(0 - 0.5) / 0.5, (1 - 0.25) / 0.1, (0.2 - 0.0) / 2.0]))


def test_uint8_images_are_normalised_in_fp32_and_then_take_the_type_of_the_weights() -> None:
    image = torch.full((1, 3, 1, 1), 131, dtype=torch.uint8)
    found = make_plain_encoder(torch.bfloat16).encode_image(image)
    expected = make_plain_encoder().encode_image(image)
    assert found.dtype == torch.bfloat16
    assert found.equal(expected.bfloat16())


def test_float_images_are_taken_as_normalised() -> None:
    image = torch.randn(1, 3, 2, 2)
    assert make_plain_encoder().encode_image(image).equal(image)


def test_means_are_not_weights() -> None:
    assert set(make_plain_encoder().state_dict()) == {"logit_scale", "visual.anchor", "text.anchor"}


def test_log_scale_has_one_element_and_is_that_of_clip() -> None:
    encoder = make_plain_encoder()
    assert encoder.logit_scale.shape == (1,)
    output = encoder(torch.zeros(1, 3), torch.zeros(1, 3))
    assert output.log_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    assert pytest.approx(100) == math.exp(MAX_LOGIT_SCALE)


def test_an_exact_logit_scale_gives_the_value_and_the_parameter_gets_the_gradient() -> None:
    encoder = make_plain_encoder()
    encoder.logit_scale.data = torch.tensor([2.671875], dtype=torch.bfloat16)
    encoder.exact_logit_scale = torch.tensor([2.6593])
    scale = encoder(torch.zeros(1, 3), torch.zeros(1, 3)).log_scale
    scale.exp().sum().backward()
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(2.6593, rel=1e-6)
    assert encoder.logit_scale.grad is not None
    assert encoder.logit_scale.grad.item() == pytest.approx(math.exp(2.6593), rel=1e-2)


def test_a_tower_whose_features_are_known_does_not_run() -> None:
    encoder = make_plain_encoder()
    known = torch.randn(1, 3)
    output = encoder(torch.zeros(1, 3), torch.zeros(1, 3), image_features=known)
    assert output.image_features is known and output.text_features.shape == (1, 3)
    assert encoder(torch.zeros(1, 3), torch.zeros(1, 3), text_features=known).text_features is known


def make_dual(name: str, architectures: dict[str, str], **settings: Any) -> DualEncoder:
    torch.manual_seed(0)
    model = ModelConfig(architecture=architectures[name], image_size=(64, 32), dual_token=True, **settings)
    encoder = build_dual_encoder(model).eval()
    for parameter in encoder.visual.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_image_queries_have_features_of_their_own(name: str, architectures: dict[str, str]) -> None:
    encoder, image = make_dual(name, architectures), make_images(64, 32)
    output = encoder(image, TOKENS)
    assert output.image_features.equal(encoder.encode_image(image))
    assert output.i2i_features.equal(encoder.encode_image(image, "i2i"))
    assert not output.i2i_features.allclose(output.image_features)
    assert output.image_tokens is None and output.text_tokens is None
    plain = build(architectures[name], (64, 32))
    assert plain.encode_image(image, "i2i").equal(plain.encode_image(image))
    assert plain(image, TOKENS).i2i_features is None


@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_details_are_tokens_beside_the_same_features(name: str, architectures: dict[str, str]) -> None:
    encoder = make_dual(name, architectures)
    plain, details = encoder(make_images(64, 32), TOKENS), encoder(make_images(64, 32), TOKENS, details=True)
    assert details.image_features.equal(plain.image_features) and details.text_features.equal(plain.text_features)
    assert details.image_tokens.shape == (2, 1 + {"vit": 8, "row_conv": 4}[name], 12)
    assert details.text_tokens.shape == (2, 8, 12)
    torch.testing.assert_close(details.image_tokens[:, 0], details.image_features)
    end = torch.tensor([3, 2])
    torch.testing.assert_close(details.text_tokens[torch.arange(2), end], details.text_features)


def test_known_features_are_kept_and_details_run_the_towers_all_the_same(architectures: dict[str, str]) -> None:
    encoder, known = make_dual("vit", architectures), torch.zeros(2, 12)
    output = encoder(make_images(64, 32), TOKENS, image_features=known, text_features=known)
    assert output.image_features is known and output.text_features is known and output.i2i_features is None
    output = encoder(make_images(64, 32), TOKENS, image_features=known, text_features=known, details=True)
    assert output.image_tokens is not None and output.text_tokens is not None
    assert bool(output.image_features.any()) and bool(output.text_features.any())


def test_evaluation_sees_the_features_of_its_task_and_the_modes_of_the_encoder(architectures: dict[str, str]) -> None:
    encoder, image = make_dual("vit", architectures).train(), make_images(64, 32)
    encoder.visual.set_patch_dropout(0.5)
    encoder.text.eval()
    for task in ("t2i", "i2i"):
        with evaluating(encoder.for_task(task)):
            assert not encoder.visual.training
            assert encoder.for_task(task).encode_image(image).equal(encoder.encode_image(image, task))
            assert encoder.for_task(task).encode_text(TOKENS).equal(encoder.encode_text(TOKENS))
        assert encoder.visual.training and not encoder.text.training
    assert set(encoder.state_dict()) == set(dict(encoder.named_parameters()))


def test_tokens_are_asked_of_towers_that_give_them(architectures: dict[str, str]) -> None:
    for name in ("vit", "row_conv"):
        build(architectures[name], (64, 32)).require_tokens("loss.mlm_weight")
    with pytest.raises(UserError, match=r"loss\.mlm_weight: this architecture's image tower gives no tokens"):
        build(architectures["resnet"], (64, 32)).require_tokens("loss.mlm_weight")
