import json
from pathlib import Path

import pytest
import torch

from reid_dist.models.projection import projection_names
from tests.models.encoders import TOKENS, build, make_images


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "row_conv", "text_bias"])
def test_features_are_linear_in_the_projection_and_in_it_alone(
    kind: str, tower: str, configs: dict, tmp_path: Path
) -> None:
    config = configs["vit" if kind == "text_bias" else kind]
    config["text_cfg"]["proj_bias"] = kind == "text_bias"
    (tmp_path / "model.json").write_text(json.dumps(config))
    encoder = build(str(tmp_path / "model.json"), (64, 32)).eval()
    image = make_images(64, 32)
    encode = {"visual": lambda: encoder.encode_image(image), "text": lambda: encoder.encode_text(TOKENS)}[tower]
    before = encode().detach()
    names = projection_names(getattr(encoder, tower))
    assert names
    with torch.no_grad():
        for name in names:
            getattr(encoder, tower).get_parameter(name).mul_(2)
    assert encode().equal(2 * before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", {"proj"}),
        ("RN50", {"attnpool.c_proj.weight", "attnpool.c_proj.bias"}),
        ("convnext_base", {"head.proj.weight"}),
        ("convnext_large_d", {"head.mlp.fc2.weight"}),
        ("EVA02-B-16", {"trunk.head.weight", "trunk.head.bias"}),
        ("MobileCLIP-S1", {"trunk.head.fc.weight", "trunk.head.fc.bias"}),
        ("ViT-B-16-SigLIP", set()),
    ],
)
def test_every_kind_of_image_tower_tells_its_projection(name: str, expected: set[str]) -> None:
    with torch.device("meta"):
        visual = build(name, (256, 256) if "Mobile" in name else (224, 224)).visual
    assert projection_names(visual) == expected
