"""What a run begins with: both towers' weights, the image tower's alone, and what is drawn anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.first_weights import load_first_weights

SIZE = (64, 32)


def make(architecture: str, seed: int = 0, **settings: Any) -> tuple[DualEncoder, ModelConfig]:
    torch.manual_seed(seed)
    model = ModelConfig(architecture=architecture, image_size=SIZE, **settings)
    encoder = build_dual_encoder(model)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return encoder, model


def save(encoder: nn.Module, path: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, path)
    return str(path)


def timm_file(folder: Path, name: str) -> str:
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    (folder / "timm.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    return str(folder / "timm.json")


def changed(before: dict[str, torch.Tensor], encoder: DualEncoder) -> set[str]:
    return {name for name, tensor in encoder.state_dict().items() if not tensor.equal(before[name])}


def copied(encoder: DualEncoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def test_without_settings_nothing_changes(architectures) -> None:
    encoder, model = make(architectures["resnet"])
    before = copied(encoder)
    assert load_first_weights(encoder, model) == [] and changed(before, encoder) == set()


def test_the_image_tower_s_file_counts_over_both_towers_and_leaves_text_alone(architectures, tmp_path: Path) -> None:
    both, image = (make(architectures["vit"], seed)[0] for seed in (1, 2))
    files = {
        "weights": save(both, tmp_path / "a.safetensors"),
        "visual_weights": save(image, tmp_path / "b.safetensors"),
    }
    encoder, model = make(architectures["vit"], 3, **files)
    said = load_first_weights(encoder, model)
    assert [line.split(" ")[0] for line in said] == ["weights", "visual_weights"] and "0 missing" in said[1]
    for name, tensor in encoder.state_dict().items():
        assert tensor.equal((image if name.startswith("visual.") else both).state_dict()[name]), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_the_image_tower_by_its_own_names(prefix: str, architectures, tmp_path: Path) -> None:
    source, _ = make(architectures["resnet"], 1)
    save_file({prefix + name: x for name, x in source.visual.state_dict().items()}, tmp_path / "visual.safetensors")
    encoder, model = make(architectures["resnet"], 2, visual_weights=str(tmp_path / "visual.safetensors"))
    text = {name: x.clone() for name, x in encoder.text.state_dict().items()}
    load_first_weights(encoder, model)
    assert all(x.equal(source.visual.state_dict()[name]) for name, x in encoder.visual.state_dict().items())
    assert all(x.equal(text[name]) for name, x in encoder.text.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_file_of_timm_s_fills_the_backbone(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    backbone = timm.create_model(name)
    encoder, model = make(timm_file(tmp_path, name), 2, visual_weights=save(backbone, tmp_path / "timm.safetensors"))
    (said,) = load_first_weights(encoder, model)
    assert "unexpected" in said and "1 missing (visual.head.proj.weight)" in said
    trunk: Any = encoder.visual.trunk
    for part, tensor in trunk.state_dict().items():
        if part != "pos_embed":
            assert tensor.equal(backbone.state_dict()[part]), part
    assert ("1 resized" in said) == (name == "test_vit")


def test_timm_s_own_weights_are_asked_for_by_the_architecture_s_name(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def create(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return backbone

    torch.manual_seed(1)
    backbone = timm.create_model("test_resnet")
    path = timm_file(tmp_path, "test_resnet.r160_in1k")
    encoders = [make(path, 2, visual_weights=weights) for weights in ("timm:", "timm:other_tag")]
    monkeypatch.setattr(timm, "create_model", create)
    for encoder, model in encoders:
        load_first_weights(encoder, model)
        assert encoder.visual.trunk.conv1[0].weight.equal(backbone.conv1[0].weight)
    assert asked == [("test_resnet.r160_in1k", True), ("test_resnet.other_tag", True)]


def test_what_cannot_be_had_is_told(architectures, tmp_path: Path, monkeypatch) -> None:
    encoder, model = make(architectures["resnet"], visual_weights="timm:")
    with pytest.raises(UserError, match=r"model\.visual_weights: .*no timm backbone.*name a file"):
        load_first_weights(encoder, model)
    encoder, model = make(timm_file(tmp_path, "test_resnet"), visual_weights="timm:")

    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot fetch timm's test_resnet: no network; give a local file"):
        load_first_weights(encoder, model)
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    encoder, model = make(architectures["resnet"], visual_weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"model\.visual_weights: nothing in .*other\.safetensors fits"):
        load_first_weights(encoder, model)
    save_file({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"model\.visual_weights: visual\.conv1\.weight in .* has shape"):
        load_first_weights(encoder, model)


def test_the_attention_pool_is_drawn_anew_after_the_weights_were_loaded(architectures, tmp_path: Path) -> None:
    source, _ = make(architectures["resnet"], 1)
    file = save(source, tmp_path / "weights.safetensors")
    encoder, model = make(architectures["resnet"], 2, weights=file, attention_pool="redrawn")
    said = load_first_weights(encoder, model)
    parts = {f"visual.attnpool.{p}_proj.{x}" for p in "qkvc" for x in ("weight", "bias")}
    assert changed(source.state_dict(), encoder) == parts and said[-1].startswith("attention_pool")
    again, _ = make(architectures["resnet"], 2, weights=file, attention_pool="redrawn")
    load_first_weights(again, model)
    assert changed(encoder.state_dict(), again) == set()
