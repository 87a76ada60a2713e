import pytest
import torch
from torch import Tensor

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.patches import find_patches, resize_position_embedding

TOKENS = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]])


def build(architecture: str, size: tuple[int, int], stride: int | None = None) -> DualEncoder:
    return build_dual_encoder(ModelConfig(architecture=architecture, image_size=size, patch_stride=stride))


def make_images(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def learned_grid(encoder: DualEncoder, size: tuple[int, int]) -> tuple[str | None, tuple[int, int]]:
    """Name of the image tower's position embedding and its grid."""
    patches = find_patches(encoder.visual)
    assert patches is not None
    return patches.embedding, patches.grid(size)


@pytest.mark.parametrize("size", [(256, 128), (384, 128), (64, 64)])
@pytest.mark.parametrize(("stride", "step"), [(None, 16), (12, 12)])
def test_vit_takes_any_size_and_overlapping_patches(
    architectures: dict[str, str], size: tuple[int, int], stride: int | None, step: int
) -> None:
    encoder = build(architectures["vit"], size, stride)
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
    encoder = build(architectures["resnet"], size)
    grid = (size[0] // 32, size[1] // 32)
    assert learned_grid(encoder, size) == ("visual.attnpool.positional_embedding", grid)
    output = encoder(make_images(*size), TOKENS)
    assert output.image_features.shape == (2, 12) and bool(output.image_features.isfinite().all())
    output.image_features.sum().backward()
    gradient = encoder.get_parameter("visual.attnpool.positional_embedding").grad
    assert gradient is not None and gradient.shape[0] == 1 + grid[0] * grid[1]


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


def test_an_open_clip_name_builds_at_our_size() -> None:
    with torch.device("meta"):
        encoder = build("ViT-B-16", (384, 128), 12)
    assert learned_grid(encoder, (384, 128)) == ("visual.positional_embedding", (31, 10))
    assert (encoder.features, encoder.text_shape.context_length) == (512, 77)


TIMM = ("ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-B", "swin_base_patch4_window7_224")


@pytest.mark.parametrize("name", [*TIMM, "convnext_tiny"])
def test_a_timm_tower_runs_at_our_size(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        encoder = build(name, (384, 128))
        assert encoder.encode_image(torch.zeros(2, 3, 384, 128)).shape == (2, encoder.features)
    if name in TIMM[:3]:
        assert learned_grid(encoder, (384, 128)) == ("visual.trunk.pos_embed", (24, 8))
    encoder.set_grad_checkpointing()


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
        build(architectures.get(name, name), size)


def test_a_patch_stride_takes_other_sizes_but_none_below_the_patch(architectures: dict[str, str]) -> None:
    encoder = build(architectures["vit"], (70, 33), 12)
    assert learned_grid(encoder, (70, 33)) == ("visual.positional_embedding", (5, 2))
    with pytest.raises(UserError, match=r"model\.image_size"):
        build(architectures["vit"], (64, 15), 12)


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_patch_stride_beyond_the_patch_is_refused(stride: int, architectures: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"patch_stride.*1\.\.16"):
        build(architectures["vit"], (64, 32), stride)


@pytest.mark.parametrize("name", ["resnet", "row_conv"])
def test_a_patch_stride_without_patches_is_refused(name: str, architectures: dict[str, str]) -> None:
    with pytest.raises(UserError, match="patch_stride"):
        build(architectures[name], (64, 32), 8)
