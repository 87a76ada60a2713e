import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder, read_architecture, set_patch_dropout
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.patches import find_patches

TOKENS = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]])


def build(architecture: str, size: tuple[int, int], stride: int | None = None) -> DualEncoder:
    return build_dual_encoder(ModelConfig(architecture=architecture, image_size=size, patch_stride=stride))


def make_images(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_row_conv_tower_comes_from_json(architectures: dict[str, str]) -> None:
    encoder = build(architectures["row_conv"], (32, 16))
    output = encoder(make_images(32, 16), TOKENS)
    assert output.image_features.shape == output.text_features.shape == (2, 12) and encoder.features == 12
    assert find_patches(encoder.visual) is None
    assert (encoder.text_shape.context_length, encoder.text_shape.vocab_size) == (8, 50)


def test_an_unknown_architecture_offers_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'ViT-B-61'.*nearest: .*ViT-B-16"):
        read_architecture("ViT-B-61")


def test_open_clip_s_own_table_is_not_changed_by_a_build() -> None:
    before = json.dumps(open_clip.get_model_config("ViT-B-32"), sort_keys=True)
    read_architecture("ViT-B-32")["vision_cfg"]["image_size"] = 1
    assert json.dumps(open_clip.get_model_config("ViT-B-32"), sort_keys=True) == before


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_base"])
def test_a_coca_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model\.architecture: {name} is a CoCa"):
        build(name, (224, 224))


@pytest.mark.parametrize("text", ["not json", "[]", "3", '{"embed_dim": 4, "vision_cfg": {}}'])
def test_a_malformed_architecture_file_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"model\.architecture.*broken\.json"):
        read_architecture(str(path))


def test_a_missing_architecture_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent\.json"):
        read_architecture(str(tmp_path / "absent.json"))


@pytest.mark.parametrize("section", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_an_unknown_key_of_an_architecture_file_is_told(section: str, name: str, configs: dict, tmp_path: Path) -> None:
    config = configs[name]
    inner = config["vision_cfg"]["row_conv"] if (section, name) == ("vision_cfg", "row_conv") else config[section]
    inner["widht"] = 3
    path = tmp_path / "typo.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"typo\.json.*widht"):
        build(str(path), (64, 32))


def test_patch_dropout_wants_a_vit(architectures: dict[str, str]) -> None:
    visual = build(architectures["vit"], (64, 32)).visual
    set_patch_dropout(visual, 0.25)
    assert visual.patch_dropout.prob == 0.25
    with pytest.raises(UserError, match="patch_dropout: only"):
        set_patch_dropout(build(architectures["row_conv"], (64, 32)).visual, 0.25)
