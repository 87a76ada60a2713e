"""Prompts and the second class token in a whole encoder: built, loaded, exported, averaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reid_dist.checkpoint.portable import save_export
from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.momentum import MomentumEncoder
from reid_dist.models.patches import resize_position_embedding
from reid_dist.models.prompts import insert
from reid_dist.models.weights import load_weights

SIZE = (64, 32)
PROMPTS = {"visual_length": 3, "visual_depth": 2, "text_length": 2, "text_depth": 1}
NAMES = {"visual.prompts", "text.prompts", "visual.class_embedding_i2i"}
Make = Callable[..., tuple[DualEncoder, ModelConfig]]


@pytest.fixture
def make(architectures: dict[str, str]) -> Make:
    """`make(architecture, **settings of model)`: an encoder with no weight at zero or one, and its settings."""

    def build(name: str = "vit", seed: int = 0, **settings: Any) -> tuple[DualEncoder, ModelConfig]:
        model = ModelConfig(architecture=architectures[name], **{"image_size": SIZE, **settings})
        torch.manual_seed(seed)
        encoder = build_dual_encoder(model).eval()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.2)
        return encoder, model

    return build


def batch(size: tuple[int, int] = SIZE, length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    token_BL = torch.randint(3, 49, (4, length), generator=generator)
    token_BL[:, -1] = 49
    return torch.randint(0, 256, (4, 3, *size), generator=generator, dtype=torch.uint8), token_BL


def features_of(encoder: DualEncoder, size: tuple[int, int] = SIZE) -> list[Tensor]:
    image_BCHW, token_BL = batch(size)
    with torch.no_grad():
        return [
            encoder.encode_image(image_BCHW),
            encoder.encode_image(image_BCHW, "i2i"),
            encoder.encode_text(token_BL),
        ]


def test_tokens_are_inserted_or_take_the_place_of_others() -> None:
    x_BNW, new_MW = torch.randn(2, 4, 3), torch.randn(2, 3).double()
    found = insert(x_BNW, new_MW, at=1)
    assert found.dtype == torch.float32 and found.shape == (2, 6, 3)
    assert found[:, 1:3].equal(new_MW.float().expand(2, 2, 3)) and found[:, [0, 3, 4, 5]].equal(x_BNW)
    assert insert(found, new_MW + 1, at=1, instead_of=2)[:, [0, 3, 4, 5]].equal(x_BNW)


def test_the_settings_are_those_of_the_towers(make: Make) -> None:
    encoder, _ = make(prompts=PROMPTS, dual_token=True)
    shapes = {name: tuple(p.shape) for name, p in encoder.prompts().items()}
    assert shapes == {"visual.prompts": (2, 3, 16), "text.prompts": (1, 2, 16)}
    assert set(dict(encoder.named_parameters())) - set(dict(make()[0].named_parameters())) == NAMES
    assert encoder.text_shape.context_length == 8 - 2, "captions leave room for the prompts"
    assert encoder.has_i2i_token and not make()[0].has_i2i_token and make()[0].prompts() == {}


def test_new_prompts_are_small(architectures: dict[str, str]) -> None:
    torch.manual_seed(0)
    settings = {"visual_length": 500, "visual_depth": 2, "text_length": 0}
    encoder = build_dual_encoder(ModelConfig(architecture=architectures["vit"], image_size=SIZE, prompts=settings))
    assert list(encoder.prompts()) == ["visual.prompts"]
    assert encoder.prompts()["visual.prompts"].std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("resnet", {"prompts": PROMPTS}, "model.prompts.visual_length"),
        ("row_conv", {"prompts": PROMPTS}, "model.prompts.visual_length"),
        ("resnet", {"dual_token": True}, "model.dual_token"),
        ("vit", {"prompts": {**PROMPTS, "visual_depth": 3}}, "model.prompts.visual_depth: 3"),
        ("vit", {"prompts": {**PROMPTS, "text_depth": 2}}, "model.prompts.text_depth: 2"),
        ("vit", {"prompts": {**PROMPTS, "text_length": 6}}, "model.prompts.text_length: 6"),
    ],
)
def test_a_tower_that_cannot_follow_names_the_key(name: str, settings: dict, key: str, make: Make) -> None:
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        make(name, **settings)


@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_plain_weights_leave_prompts_alone_and_begin_the_second_token_with_the_first(
    name: str, make: Make, tmp_path: Path
) -> None:
    plain, model = make(name)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    prompts = {**PROMPTS, "visual_length": 3 if name == "vit" else 0}
    encoder, _ = make(name, seed=1, prompts=prompts, dual_token=True)
    kept = {name: p.detach().clone() for name, p in encoder.prompts().items()}
    report = load_weights(encoder, str(tmp_path / "plain.pt"), model.architecture, SIZE)
    assert report.missing == sorted(kept) and report.unexpected == []
    second = {"vit": ["class_embedding_i2i"], "row_conv": ["projection_i2i.weight", "projection_i2i.bias"]}[name]
    assert report.copied == [f"visual.{part}" for part in second]
    assert ", ".join(report.copied) in report.summary()
    state = encoder.state_dict()
    assert all(state[name].equal(value) for name, value in kept.items())
    for copied in report.copied:
        assert state[copied].equal(plain.state_dict()[copied.replace("_i2i", "")])
    assert not set(report.matched) & {*report.copied, *report.missing}


@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_an_export_gives_the_same_features_again(name: str, make: Make, tmp_path: Path) -> None:
    prompts = {**PROMPTS, "visual_length": 3 if name == "vit" else 0}
    encoder, model = make(name, prompts=prompts, dual_token=True)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    save_export(tmp_path / "export", state, model, None, {})
    again, _ = make(name, seed=1, prompts=prompts, dual_token=True)
    report = load_weights(again, str(tmp_path / "export"), model.architecture, SIZE)
    assert (report.missing, report.unexpected, report.copied, report.resized) == ([], [], [], [])
    for found, expected in zip(features_of(again), features_of(encoder), strict=True):
        assert found.equal(expected)
    image, i2i, _ = features_of(again)
    assert not image.allclose(i2i)


def test_prompts_stay_as_they_are_where_the_image_size_changes(make: Make, tmp_path: Path) -> None:
    encoder, model = make(prompts=PROMPTS, dual_token=True)
    save_export(tmp_path / "export", {f"encoder.{n}": x for n, x in encoder.state_dict().items()}, model, None, {})
    wide, _ = make(seed=1, prompts=PROMPTS, dual_token=True, image_size=(96, 64), patch_stride=12)
    report = load_weights(wide, str(tmp_path / "export"), model.architecture, (96, 64))
    assert report.resized == ["visual.positional_embedding"] and report.missing == []
    positions = encoder.get_parameter("visual.positional_embedding").detach()
    expected = resize_position_embedding(positions, (4, 2), (7, 5))
    torch.testing.assert_close(wide.get_parameter("visual.positional_embedding").detach(), expected)
    assert wide.prompts()["visual.prompts"].equal(encoder.prompts()["visual.prompts"])
    assert [x.shape for x in features_of(wide, (96, 64))] == [(4, 12)] * 3


def test_prompts_of_another_shape_are_refused(make: Make, tmp_path: Path) -> None:
    encoder, model = make(prompts=PROMPTS)
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    other, _ = make(prompts={**PROMPTS, "visual_length": 2})
    with pytest.raises(UserError, match=r"visual\.prompts .*\(2, 3, 16\).*set model\.prompts to that of the file"):
        load_weights(other, str(tmp_path / "weights.pt"), model.architecture, SIZE)


def test_key_encoders_average_prompts_and_class_tokens(make: Make) -> None:
    encoder, _ = make(prompts=PROMPTS, dual_token=True)
    keys = MomentumEncoder(encoder, ("visual", "text"), momentum=0.75)
    assert {f"encoder.{name}" for name in NAMES} <= set(keys.names)
    before = {name: tensor.clone() for name, tensor in keys.state().items()}
    moved = {name: tensor + torch.randn(tensor.shape) for name, tensor in before.items()}
    keys.update(moved.items())
    for name, tensor in keys.state().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * moved[name], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name != "logit_scale":
                parameter.copy_(keys.state()[f"encoder.{name}"])
    image_BCHW, token_BL = batch()
    encoder.train().requires_grad_(False)
    assert keys.encode_image(image_BCHW).equal(encoder.encode_image(image_BCHW))
    assert keys.encode_text(token_BL).equal(encoder.encode_text(token_BL))


def test_frozen_prompts_of_key_encoders_stay_bit_for_bit(make: Make) -> None:
    encoder, _ = make(prompts=PROMPTS)
    keys = MomentumEncoder(encoder, ("visual", "text"), momentum=0.999)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for _ in range(5):
        keys.update((name, state[name]) for name in keys.names)
    assert all(keys.state()[f"encoder.{name}"].equal(value) for name, value in encoder.prompts().items())
