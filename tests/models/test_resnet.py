"""CLIP's and timm's ResNets as TextReID changes them: the last stride, a further map, the redrawn attention pool."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.linear import redrawn_linears
from reid_dist.models.patches import find_patches
from reid_dist.models.projection import projection_names
from reid_dist.models.resnet import keep_last_resolution, redraw_attention_pool
from reid_dist.models.weights import load_weights

SIZE = (64, 32)


def build(architecture: str, **settings: Any) -> DualEncoder:
    torch.manual_seed(0)
    encoder = build_dual_encoder(ModelConfig(architecture=architecture, image_size=SIZE, **settings)).eval()
    for parameter in encoder.visual.parameters():  # open_clip starts the blocks of a ResNet at zero
        nn.init.normal_(parameter, std=0.1)
    return encoder


def timm_file(folder: Path, name: str = "resnet18", embed_dim: int = 512, proj: str = "none") -> str:
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": proj}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    path = folder / "timm.json"
    path.write_text(json.dumps({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


# Published sizes


@pytest.mark.parametrize(("name", "width", "published"), [("RN50", 1024, 38_316_896), ("RN101", 512, None)])
def test_clip_s_resnets_at_384x128_have_a_map_of_24x8_and_32_heads(name: str, width: int, published: int) -> None:
    model = ModelConfig(architecture=f"{name}-quickgelu", last_stride=1, projection=256)
    with torch.device("meta"):
        encoder = build_dual_encoder(model)
    pool: Any = encoder.visual.attnpool
    assert pool.positional_embedding.shape == (1 + 24 * 8, 2048) and pool.num_heads == 32
    assert pool.c_proj.out_features == width and encoder.features == 256
    head: Any = encoder.visual.projection_head
    assert head.weight.shape == (256, width) and head.bias.shape == (256,)
    if published is not None:  # open_clip's RN50 with 7 x 7 positions, which OpenAI's file fills
        more = (24 * 8 - 7 * 7) * 2048 + 256 * width + 256
        assert sum(p.numel() for p in encoder.visual.parameters()) == published + more


def test_the_imagenet_baseline_has_2048_features_and_a_map_of_24x8() -> None:
    path = Path(__file__).parents[2] / "configs" / "models" / "resnet50_imagenet.json"
    with torch.device("meta"):
        encoder = build_dual_encoder(ModelConfig(architecture=str(path), last_stride=1, projection=256))
        trunk: Any = encoder.visual.trunk
        assert trunk.forward_features(torch.empty(2, 3, 384, 128)).shape == (2, 2048, 24, 8)
    # torchvision's ResNet-50 without its classifier: 25,557,032 - 2,049,000.
    assert sum(p.numel() for p in trunk.parameters()) == 23_508_032
    assert sum(p.numel() for p in encoder.visual.parameters()) == 23_508_032 + 2048 * 256 + 256


# The last stride


def clip_block(block: Any, x: Tensor, stride: int) -> Tensor:
    """CLIP's bottleneck from its weights: it pools before the third convolution and in the shortcut."""

    def norm(x: Tensor, bn: Any) -> Tensor:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    y = norm(F.conv2d(x, block.conv1.weight), block.bn1).relu()
    y = norm(F.conv2d(y, block.conv2.weight, padding=1), block.bn2).relu()
    y = norm(F.conv2d(F.avg_pool2d(y, stride), block.conv3.weight), block.bn3)
    shortcut = norm(F.conv2d(F.avg_pool2d(x, stride), block.downsample[1].weight), block.downsample[2])
    return (y + shortcut).relu()


@pytest.mark.parametrize("stride", [1, 2])
def test_the_last_stage_computes_what_clip_s_code_would_with_that_stride(stride: int, architectures) -> None:
    visual: Any = build(architectures["resnet"], last_stride=stride).visual
    x = visual.layer3(visual.layer2(visual.layer1(visual.stem(images()))))
    found = visual.layer4(x)
    assert found.shape[2:] == ((4, 2) if stride == 1 else (2, 1))
    torch.testing.assert_close(found, clip_block(visual.layer4[0], x, stride))


def test_the_weights_are_those_of_the_other_stride(architectures) -> None:
    plain, kept = build(architectures["resnet"]), build(architectures["resnet"], last_stride=1)
    shapes = [{n: p.shape for n, p in e.visual.named_parameters() if "positional" not in n} for e in (plain, kept)]
    assert shapes[0] == shapes[1]
    patches = find_patches(kept.visual)
    assert patches is not None and patches.size == (16, 16) and patches.grid(SIZE) == (4, 2)


def test_positions_of_a_file_of_the_other_stride_are_resized(architectures, tmp_path: Path) -> None:
    square = build_dual_encoder(ModelConfig(architecture=architectures["resnet"], image_size=(96, 96)))
    torch.save(square.state_dict(), tmp_path / "square.pt")
    kept: Any = build(architectures["resnet"], last_stride=1)
    report = load_weights(kept, str(tmp_path / "square.pt"), "resnet.json", SIZE)
    assert report.resized == ["visual.attnpool.positional_embedding"] and not report.missing
    assert kept.visual.attnpool.positional_embedding.shape[0] == 1 + 4 * 2


def test_the_grid_of_an_export_is_read_with_the_stride_of_its_manifest(architectures, tmp_path: Path) -> None:
    from reid_dist.checkpoint.portable import save_export

    model = ModelConfig(architecture=architectures["resnet"], image_size=SIZE)
    plain = build(architectures["resnet"])
    save_export(tmp_path / "export", {f"encoder.{n}": t for n, t in plain.state_dict().items()}, model, None, {})
    kept = build(architectures["resnet"], last_stride=1)
    report = load_weights(kept, str(tmp_path / "export"), "resnet.json", SIZE)
    assert report.resized == ["visual.attnpool.positional_embedding"] and not report.missing
    old, new = plain.visual.attnpool.positional_embedding, kept.visual.attnpool.positional_embedding
    grid = old[1:].T.reshape(1, -1, 2, 1)  # 64x32 pixels in steps of 32
    expected = F.interpolate(grid, (4, 2), mode="bilinear", align_corners=False).reshape(old.shape[1], -1).T
    torch.testing.assert_close(new, torch.cat([old[:1], expected]))


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "resnet50"])
def test_timm_s_resnets_keep_their_map_too(name: str, tmp_path: Path) -> None:
    channels = 512 if name == "resnet18" else 2048
    path = timm_file(tmp_path, name, channels)
    plain, kept = build(path), build(path, last_stride=1)
    trunks: Any = [plain.visual.trunk, kept.visual.trunk]
    maps = [trunk.forward_features(images()) for trunk in trunks]
    assert [x.shape[2:] for x in maps] == [(2, 1), (4, 2)]
    assert plain.encode_image(images()).shape == (3, channels)
    # Subsampled, a convolution of stride 1 is that of stride 2; the shortcut of the "d" variant pools instead.
    if name != "resnet26d":
        x = torch.randn(2, trunks[0].layer4[0].conv1.in_channels, 6, 4)
        pick = slice(None), slice(None), slice(None, None, 2), slice(None, None, 2)
        torch.testing.assert_close(trunks[0].layer4[0].downsample(x), trunks[1].layer4[0].downsample(x)[pick])


def test_other_towers_have_no_last_stage(architectures) -> None:
    for name in ("vit", "row_conv"):
        with pytest.raises(UserError, match=r"model\.last_stride: only ResNets"):
            build(architectures[name], last_stride=1)
    with pytest.raises(UserError, match=r"model\.last_stride"):
        keep_last_resolution(timm.create_model("resnet18"))


# A further map


@pytest.mark.parametrize("name", ["resnet", "vit", "row_conv", "timm"])
def test_projection_maps_both_towers_features_on(name: str, architectures, tmp_path: Path) -> None:
    path = timm_file(tmp_path) if name == "timm" else architectures[name]
    encoder = build(path, projection=7)
    heads: Any = [encoder.visual.projection_head, encoder.text.projection_head]
    token_BL = torch.tensor([[1, 7, 49, 0, 0, 0, 0, 0]])
    found = [encoder.encode_image(images()), encoder.encode_text(token_BL)]
    assert found[0].shape == (3, 7) and found[1].shape == (1, 7) and encoder.features == 7
    for tower, head in zip((encoder.visual, encoder.text), heads, strict=True):
        assert projection_names(tower) == {"projection_head.weight", "projection_head.bias"}
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 3.0)
    assert (encoder.encode_image(images()) == 3).all() and (encoder.encode_text(token_BL) == 3).all()


def test_projection_maps_what_the_tower_gave_without_it(architectures) -> None:
    plain, projected = build(architectures["vit"]), build(architectures["vit"], projection=7)
    projected.load_state_dict(plain.state_dict(), strict=False)
    head: Any = projected.visual.projection_head
    before, after = plain.visual(images(), details=True), projected.visual(images(), details=True)
    torch.testing.assert_close(after.features, head(before.features))
    torch.testing.assert_close(after.tokens, head(before.tokens))
    assert after.i2i_features is None


def test_image_queries_pass_the_further_map_too(architectures) -> None:
    encoder = build(architectures["vit"], projection=7, dual_token=True)
    assert encoder.encode_image(images(), task="i2i").shape == (3, 7)


def test_a_width_that_timm_does_not_give_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"timm_proj none.* 512; set embed_dim"):
        build(timm_file(tmp_path, embed_dim=100))
    assert build(timm_file(tmp_path, embed_dim=100, proj="linear")).encode_image(images()).shape == (3, 100)


# The attention pool


def test_redrawing_changes_the_four_projections_and_nothing_else(architectures) -> None:
    visual: Any = build(architectures["resnet"]).visual
    before = {name: tensor.clone() for name, tensor in visual.state_dict().items()}
    torch.manual_seed(3)
    redraw_attention_pool(visual)
    parts = {f"attnpool.{p}_proj.{x}" for p in "qkvc" for x in ("weight", "bias")}
    after = visual.state_dict()
    assert {name for name, tensor in before.items() if not tensor.equal(after[name])} == parts
    assert not any(after[name].any() for name in parts if name.endswith("bias"))
    width = visual.attnpool.q_proj.out_features
    assert float(after["attnpool.q_proj.weight"].std()) == pytest.approx((2 / width) ** 0.5, rel=0.02)
    assert set(redrawn_linears(visual)) == {f"attnpool.{p}_proj" for p in "qkvc"}


def test_only_clip_s_resnets_have_an_attention_pool(architectures, tmp_path: Path) -> None:
    for path in (architectures["vit"], architectures["row_conv"], timm_file(tmp_path)):
        with pytest.raises(UserError, match=r"model\.attention_pool: only CLIP's ResNets"):
            build(path, attention_pool="redrawn")
