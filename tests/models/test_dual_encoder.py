import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import (
    MAX_LOGIT_SCALE,
    DualEncoder,
    build_dual_encoder,
    find_patches,
    projection_names,
    read_architecture,
    resize_position_embedding,
)

TOKENS = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]])


def learned_grid(encoder: DualEncoder, size: tuple[int, int]) -> tuple[str | None, tuple[int, int]]:
    """Name of the image tower's position embedding and its grid."""
    patches = find_patches(encoder.visual)
    assert patches is not None
    return patches.embedding, patches.grid(size)


def make_images(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(256, 128), (384, 128), (64, 64)])
@pytest.mark.parametrize(("stride", "step"), [(None, 16), (12, 12)])
def test_vit_takes_any_size_and_overlapping_patches(
    architectures: dict[str, str], size: tuple[int, int], stride: int | None, step: int
) -> None:
    encoder = build_dual_encoder(architectures["vit"], size, stride)
    grid = ((size[0] - 16) // step + 1, (size[1] - 16) // step + 1)
    assert learned_grid(encoder, size) == ("visual.positional_embedding", grid)
    assert encoder.get_parameter("visual.positional_embedding").shape == (1 + grid[0] * grid[1], 16)
    output = encoder(make_images(*size), TOKENS)
    assert output.image_features.shape == output.text_features.shape == (2, 12)
    output.image_features.sum().backward()
    gradient = encoder.get_parameter("visual.positional_embedding").grad
    assert gradient is not None and bool(gradient.any(dim=1).all()), "a position is not used"


@pytest.mark.parametrize("size", [(128, 64), (64, 64), (64, 160)])
def test_modified_resnet_runs_at_sizes_that_are_not_square(
    architectures: dict[str, str], size: tuple[int, int]
) -> None:
    encoder = build_dual_encoder(architectures["resnet"], size)
    grid = (size[0] // 32, size[1] // 32)
    assert learned_grid(encoder, size) == ("visual.attnpool.positional_embedding", grid)
    output = encoder(make_images(*size), TOKENS)
    assert output.image_features.shape == (2, 12) and bool(output.image_features.isfinite().all())
    output.image_features.sum().backward()
    gradient = encoder.get_parameter("visual.attnpool.positional_embedding").grad
    assert gradient is not None and gradient.shape[0] == 1 + grid[0] * grid[1]


def test_row_conv_tower_comes_from_json(architectures: dict[str, str]) -> None:
    encoder = build_dual_encoder(architectures["row_conv"], (32, 16))
    output = encoder(make_images(32, 16), TOKENS)
    assert output.image_features.shape == output.text_features.shape == (2, 12) and encoder.features == 12
    assert find_patches(encoder.visual) is None
    assert (encoder.text_shape.context_length, encoder.text_shape.vocab_size) == (8, 50)


@pytest.mark.parametrize("name", ["vit", "row_conv"])
def test_checkpointing_changes_nothing(name: str, architectures: dict[str, str]) -> None:
    torch.manual_seed(0)
    encoder = build_dual_encoder(architectures[name], (64, 32))
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
    encoder = build_dual_encoder(architectures["resnet"], (64, 64))
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
    from reid_dist.models.dual_encoder import TextShape

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


def ramp(rows: int, columns: int) -> Tensor:
    """A class row of -1 and a grid whose first feature is the row number, its second the column number."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = torch.stack([row, column], dim=-1).reshape(-1, 2).float()
    return torch.cat([torch.full((1, 2), -1.0), grid])


def bilinear_oracle(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Pixel centres at half steps (align_corners=False), edges repeated."""
    grid = embedding[1:].view(*old, -1)
    result = [embedding[0]]

    def neighbours(i: int, old_size: int, new_size: int) -> tuple[int, int, float]:
        at = max(0.0, (i + 0.5) * old_size / new_size - 0.5)
        low = min(int(at), old_size - 1)
        return low, min(low + 1, old_size - 1), at - low

    for r in range(new[0]):
        r0, r1, dr = neighbours(r, old[0], new[0])
        for c in range(new[1]):
            c0, c1, dc = neighbours(c, old[1], new[1])
            top = (1 - dc) * grid[r0, c0] + dc * grid[r0, c1]
            bottom = (1 - dc) * grid[r1, c0] + dc * grid[r1, c1]
            result.append((1 - dr) * top + dr * bottom)
    return torch.stack(result)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_equal_grids_leave_the_position_embedding_alone(mode: str) -> None:
    embedding = torch.randn(1 + 12, 5)
    found = resize_position_embedding(embedding, (4, 3), (4, 3), mode)  # type: ignore[arg-type]
    torch.testing.assert_close(found, embedding, atol=1e-6, rtol=0)


@pytest.mark.parametrize("new", [(8, 2), (2, 2), (5, 7), (24, 8)])
def test_resizing_equals_hand_written_bilinear_interpolation(new: tuple[int, int]) -> None:
    embedding = torch.randn(1 + 12, 5, generator=torch.Generator().manual_seed(0))
    found = resize_position_embedding(embedding, (3, 4), new)
    torch.testing.assert_close(found, bilinear_oracle(embedding, (3, 4), new), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_class_row_stays_bit_for_bit(mode: str) -> None:
    embedding = torch.randn(1 + 16, 5)
    assert resize_position_embedding(embedding, (4, 4), (6, 2), mode)[0].equal(embedding[0])  # type: ignore[arg-type]


def test_rows_stay_rows_and_columns_stay_columns() -> None:
    found = resize_position_embedding(ramp(4, 4), (4, 4), (8, 2))[1:].view(8, 2, 2)
    for r in range(8):
        assert found[r, 0, 0] == found[r, 1, 0], "the row feature changes along a row"
    for c in range(2):
        assert bool((found[:, c, 1] == found[0, c, 1]).all()), "the column feature changes along a column"
    assert bool((found[:, 0, 0].diff() >= 0).all()) and found[7, 0, 0] > found[0, 0, 0]
    assert found[0, 1, 1] > found[0, 0, 1]


def test_an_unknown_architecture_offers_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'ViT-B-61'.*nearest: .*ViT-B-16"):
        read_architecture("ViT-B-61")


def test_open_clip_s_own_table_is_not_changed_by_a_build() -> None:
    before = json.dumps(open_clip.get_model_config("ViT-B-32"), sort_keys=True)
    read_architecture("ViT-B-32")["vision_cfg"]["image_size"] = 1
    assert json.dumps(open_clip.get_model_config("ViT-B-32"), sort_keys=True) == before


def test_an_open_clip_name_builds_at_our_size() -> None:
    with torch.device("meta"):
        encoder = build_dual_encoder("ViT-B-16", (384, 128), 12)
    assert learned_grid(encoder, (384, 128)) == ("visual.positional_embedding", (31, 10))
    assert (encoder.features, encoder.text_shape.context_length) == (512, 77)


# One of each kind whose size timm fixes at building: plain ViT, rotary positions, hybrid stem, windows.
TIMM = ("ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-B", "swin_base_patch4_window7_224")


@pytest.mark.parametrize("name", [*TIMM, "convnext_tiny"])
def test_a_timm_tower_runs_at_our_size(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        encoder = build_dual_encoder(name, (384, 128))
        assert encoder.encode_image(torch.zeros(2, 3, 384, 128)).shape == (2, encoder.features)
    if name in TIMM[:3]:
        assert learned_grid(encoder, (384, 128)) == ("visual.trunk.pos_embed", (24, 8))
    encoder.set_grad_checkpointing()


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_base"])
def test_a_coca_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model\.architecture: {name} is a CoCa"):
        build_dual_encoder(name, (224, 224))


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("vit", (250, 128), "240x128 or 256x128"),
        ("vit", (256, 100), "256x96 or 256x112"),
        ("vit", (8, 250), "16x240 or 16x256"),
        ("vit", (8, 64), "16x64"),
        ("resnet", (80, 100), "64x96 or 96x128"),
        ("resnet", (16, 16), "32x32"),
        ("ViT-B-16-SigLIP", (380, 128), "368x128 or 384x128"),
        ("ViT-L-14", (384, 128), "378x126 or 392x140"),
    ],
)
def test_a_size_that_is_not_of_whole_patches_is_refused(
    name: str, size: tuple[int, int], nearest: str, architectures: dict[str, str]
) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=rf"model\.image_size: .*that work: {nearest}$"):
        build_dual_encoder(architectures.get(name, name), size)


def test_a_patch_stride_takes_other_sizes_but_none_below_the_patch(architectures: dict[str, str]) -> None:
    encoder = build_dual_encoder(architectures["vit"], (70, 33), 12)
    assert learned_grid(encoder, (70, 33)) == ("visual.positional_embedding", (5, 2))
    with pytest.raises(UserError, match=r"model\.image_size"):
        build_dual_encoder(architectures["vit"], (64, 15), 12)


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
        build_dual_encoder(str(path), (64, 32))


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_patch_stride_beyond_the_patch_is_refused(stride: int, architectures: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"patch_stride.*1\.\.16"):
        build_dual_encoder(architectures["vit"], (64, 32), stride)


@pytest.mark.parametrize("name", ["resnet", "row_conv"])
def test_a_patch_stride_without_patches_is_refused(name: str, architectures: dict[str, str]) -> None:
    with pytest.raises(UserError, match="patch_stride"):
        build_dual_encoder(architectures[name], (64, 32), 8)


# The projection


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "row_conv", "text_bias"])
def test_features_are_linear_in_the_projection_and_in_it_alone(
    kind: str, tower: str, configs: dict, tmp_path: Path
) -> None:
    config = configs["vit" if kind == "text_bias" else kind]
    config["text_cfg"]["proj_bias"] = kind == "text_bias"
    (tmp_path / "model.json").write_text(json.dumps(config))
    encoder = build_dual_encoder(str(tmp_path / "model.json"), (64, 32)).eval()
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
        visual = build_dual_encoder(name, (256, 256) if "Mobile" in name else (224, 224)).visual
    assert projection_names(visual) == expected
