import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reid_dist.checkpoint.portable import save_export
from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.patches import resize_position_embedding
from reid_dist.models.weights import canonical_names, load_weights, read_state_dict

TOKENS = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]])
SIZE = (64, 64)


def build(architecture: str, size: tuple[int, int], stride: int | None = None) -> DualEncoder:
    return build_dual_encoder(ModelConfig(architecture=architecture, image_size=size, patch_stride=stride))


def randomize(module: nn.Module) -> nn.Module:
    """Every weight and buffer different from how a constructor leaves it."""
    torch.manual_seed(7)
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        if tensor.isfinite().all():
            tensor.data.add_(0.1 * torch.rand_like(tensor))
    return module


def make_clip(config: dict[str, Any]) -> open_clip.CLIP:
    """open_clip's own CLIP: text weights at the top level, a 0-dimensional logit_scale."""
    clip = randomize(open_clip.CLIP(**config)).eval()
    assert isinstance(clip, open_clip.CLIP)
    return clip


def openai_state(clip: open_clip.CLIP) -> dict[str, Tensor]:
    """As OpenAI stored it: half precision, and facts about the model among the weights."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in clip.state_dict().items()}
    facts = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(8), "vocab_size": torch.tensor(50)}
    return state | facts


def quick_gelu(config: dict[str, Any], folder: Path) -> str:
    """Gives a configuration OpenAI's activation; returns the path of its JSON file."""
    config["quick_gelu"] = True
    path = folder / "quick.json"
    path.write_text(json.dumps(config))
    return str(path)


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def assert_same_model(encoder: DualEncoder, clip: open_clip.CLIP) -> None:
    encoder.eval()
    with torch.no_grad():
        output = encoder(images(), TOKENS)
        torch.testing.assert_close(output.image_features, clip.encode_image(images()), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.text_features, clip.encode_text(TOKENS), atol=1e-6, rtol=1e-5)
        assert output.log_scale.item() == pytest.approx(clip.logit_scale.item())
    assert encoder.logit_scale.shape == (1,)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_open_clip_gives_open_clip_s_features(
    name: str, suffix: str, architectures: dict[str, str], configs: dict, tmp_path: Path
) -> None:
    clip = make_clip(configs[name])
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        # As open_clip's training saves it, from a DDP-wrapped model.
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in clip.state_dict().items()}}, path)
    else:
        save_file(clip.state_dict(), path)
    encoder = build(architectures[name], SIZE)
    report = load_weights(encoder, str(path), architectures[name], SIZE)
    assert_same_model(encoder, clip)
    assert (report.resized, report.missing, report.unexpected) == ([], [], [])
    assert len(report.matched) == len(encoder.state_dict())


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_openai_s_state_dict_gives_open_clip_s_features(name: str, configs: dict, tmp_path: Path) -> None:
    architecture = quick_gelu(configs[name], tmp_path)
    clip = make_clip(configs[name])
    state = openai_state(clip)
    assert state["logit_scale"].dim() == 0
    torch.save(state, tmp_path / "openai.pt")
    clip.load_state_dict({n: v.float() for n, v in state.items() if n in clip.state_dict()})  # rounded alike
    encoder = build(architecture, SIZE)
    report = load_weights(encoder, str(tmp_path / "openai.pt"), architecture, SIZE)
    assert_same_model(encoder, clip)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert (report.missing, report.unexpected) == ([], [])


def test_openai_s_weights_are_refused_without_their_activation(
    architectures: dict[str, str], configs: dict, tmp_path: Path
) -> None:
    path = tmp_path / "openai.pt"
    torch.save(openai_state(make_clip(configs["vit"])), path)
    with pytest.raises(UserError, match=r'openai\.pt .*`"quick_gelu": true` over .*vit\.json'):
        load_weights(build(architectures["vit"], SIZE), str(path), architectures["vit"], SIZE)
    with torch.device("meta"):
        encoder = build("ViT-B-16", SIZE)
    with pytest.raises(UserError, match=r"choose ViT-B-16-quickgelu$"):
        load_weights(encoder, str(path), "ViT-B-16", SIZE)


def test_names_with_a_text_tower_are_kept(architectures: dict[str, str], configs: dict, tmp_path: Path) -> None:
    custom = randomize(open_clip.CustomTextCLIP(**configs["vit"])).eval()
    torch.save(custom.state_dict(), tmp_path / "custom.pt")
    encoder = build(architectures["vit"], SIZE)
    report = load_weights(encoder, str(tmp_path / "custom.pt"), architectures["vit"], SIZE)
    assert (report.missing, report.unexpected) == ([], [])
    assert_same_model(encoder, custom)  # type: ignore[arg-type]


def test_a_square_grid_of_as_many_positions_is_resized_too(
    architectures: dict[str, str], configs: dict, tmp_path: Path
) -> None:
    """8x2 has as many positions as 4x4; 512x128 in patches of 16 as many as 256x256."""
    clip = make_clip(configs["vit"])
    torch.save(clip.state_dict(), tmp_path / "square.pt")
    encoder = build(architectures["vit"], (128, 32))
    report = load_weights(encoder, str(tmp_path / "square.pt"), architectures["vit"], (128, 32))
    expected = resize_position_embedding(clip.visual.positional_embedding.detach(), (4, 4), (8, 2))
    torch.testing.assert_close(encoder.get_parameter("visual.positional_embedding").detach(), expected)
    assert report.resized == ["visual.positional_embedding"]


@pytest.mark.parametrize(("size", "stride"), [((96, 32), None), ((64, 64), 8), ((160, 64), 12)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resized_positions_equal_the_resizer_s(
    size: tuple[int, int], stride: int | None, mode: Any, architectures: dict[str, str], configs: dict, tmp_path: Path
) -> None:
    clip = make_clip(configs["vit"])
    torch.save(clip.state_dict(), tmp_path / "square.pt")
    encoder = build(architectures["vit"], size, stride)
    report = load_weights(encoder, str(tmp_path / "square.pt"), architectures["vit"], size, mode)
    step = stride or 16
    grid = ((size[0] - 16) // step + 1, (size[1] - 16) // step + 1)
    expected = resize_position_embedding(clip.visual.positional_embedding.detach(), (4, 4), grid, mode)
    found = encoder.get_parameter("visual.positional_embedding").detach()
    torch.testing.assert_close(found, expected)
    assert report.resized == ["visual.positional_embedding"]
    assert report.resized[0] not in report.matched
    assert len(report.matched) + 1 == len(encoder.state_dict())


def test_a_resnet_s_attention_pool_is_resized(architectures: dict[str, str], configs: dict, tmp_path: Path) -> None:
    clip = make_clip(configs["resnet"])
    torch.save(clip.state_dict(), tmp_path / "square.pt")
    encoder = build(architectures["resnet"], (128, 64))
    report = load_weights(encoder, str(tmp_path / "square.pt"), architectures["resnet"], (128, 64))
    expected = resize_position_embedding(clip.visual.attnpool.positional_embedding.detach(), (2, 2), (4, 2))
    torch.testing.assert_close(encoder.get_parameter("visual.attnpool.positional_embedding").detach(), expected)
    assert report.resized == ["visual.attnpool.positional_embedding"]


def export(
    folder: Path,
    architecture: str,
    size: tuple[int, int],
    stride: int | None = None,
    told: tuple[int, int] | None = None,
) -> Tensor:
    """An export of ours whose manifest tells the size `told`; returns its position embedding."""
    encoder = randomize(build(architecture, size, stride))
    model = ModelConfig(architecture=architecture, image_size=told or size, patch_stride=stride)
    save_export(folder, {f"encoder.{n}": v for n, v in encoder.state_dict().items()}, model, None, {})
    return encoder.state_dict()["visual.positional_embedding"]


@pytest.mark.parametrize("named", ["folder", "file"])
@pytest.mark.parametrize(
    ("size", "stride", "grid", "new_size", "new_grid"),
    [
        ((384, 128), None, (24, 8), (256, 128), (16, 8)),
        ((160, 64), 12, (13, 5), (96, 32), (6, 2)),
        ((128, 32), None, (8, 2), (64, 64), (4, 4)),  # as many, and a square on one side
        ((128, 32), None, (8, 2), (32, 128), (2, 8)),
    ],
)
def test_an_export_of_another_size_is_resized_from_the_grid_that_its_manifest_tells(
    size: tuple[int, int],
    stride: int | None,
    grid: tuple[int, int],
    new_size: tuple[int, int],
    new_grid: tuple[int, int],
    named: str,
    architectures: dict[str, str],
    tmp_path: Path,
) -> None:
    embedding = export(tmp_path / "export", architectures["vit"], size, stride)
    weights = tmp_path / "export" / ("model.safetensors" if named == "file" else "")
    encoder = build(architectures["vit"], new_size)
    report = load_weights(encoder, str(weights), architectures["vit"], new_size)
    expected = resize_position_embedding(embedding, grid, new_grid)
    torch.testing.assert_close(encoder.get_parameter("visual.positional_embedding").detach(), expected)
    assert (report.resized, report.missing) == (["visual.positional_embedding"], [])


@pytest.mark.parametrize(("size", "stride"), [((128, 32), None), ((160, 64), 12), ((96, 32), None)])
def test_an_export_of_the_same_size_is_not_resized(
    size: tuple[int, int], stride: int | None, architectures: dict[str, str], tmp_path: Path
) -> None:
    """8x2 are 16, but no square."""
    embedding = export(tmp_path / "export", architectures["vit"], size, stride)
    encoder = build(architectures["vit"], size, stride)
    report = load_weights(encoder, str(tmp_path / "export"), architectures["vit"], size)
    assert report.resized == [] and encoder.get_parameter("visual.positional_embedding").equal(embedding)


@pytest.mark.parametrize("manifest", ["{", "[]", '{"model": 3}', '{"model": {"image_size": [1], "patch_stride": 0}}'])
def test_a_manifest_that_is_not_ours_or_tells_another_count_is_not_believed(
    manifest: str, architectures: dict[str, str], tmp_path: Path
) -> None:
    embedding = export(tmp_path / "export", architectures["vit"], (64, 64), told=(48, 16))
    for content in (None, manifest):
        if content is not None:
            (tmp_path / "export" / "manifest.json").write_text(content)
        encoder = build(architectures["vit"], (128, 32))
        load_weights(encoder, str(tmp_path / "export"), architectures["vit"], (128, 32))
        expected = resize_position_embedding(embedding, (4, 4), (8, 2))
        torch.testing.assert_close(encoder.get_parameter("visual.positional_embedding").detach(), expected)


@pytest.mark.parametrize(("trunk", "pool"), [("test_vit", "token"), ("vit_wee_patch16_reg1_gap_256", "avg")])
def test_a_timm_tower_s_positions_are_resized(trunk: str, pool: str, configs: dict, tmp_path: Path) -> None:
    """As timm does it itself; SigLIP's have no class row, as the second's, EVA's have one."""
    config = configs["vit"]
    config["vision_cfg"] = {"timm_model_name": trunk, "timm_pool": pool}
    path = tmp_path / "timm.json"
    path.write_text(json.dumps(config))
    square = randomize(build(str(path), (128, 128))).eval()
    torch.save(square.state_dict(), tmp_path / "square.pt")
    encoder = build(str(path), (192, 64)).eval()
    report = load_weights(encoder, str(tmp_path / "square.pt"), str(path), (192, 64), "bicubic")
    assert (report.resized, report.missing) == (["visual.trunk.pos_embed"], [])
    square.visual.set_input_size((192, 64))  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(images(192, 64)), square.encode_image(images(192, 64)))


def test_positions_that_fit_no_square_are_refused(architectures: dict[str, str], tmp_path: Path) -> None:
    torch.save(build(architectures["vit"], (96, 32)).state_dict(), tmp_path / "flat.pt")
    encoder = build(architectures["vit"], (64, 64))
    with pytest.raises(UserError, match=r"12 grid positions.*4x4"):
        load_weights(encoder, str(tmp_path / "flat.pt"), architectures["vit"], (64, 64))


def test_the_report_names_what_is_missing_and_what_is_unexpected(architectures: dict[str, str], tmp_path: Path) -> None:
    encoder = build(architectures["vit"], SIZE)
    state = dict(randomize(build(architectures["vit"], SIZE)).state_dict())
    missing = [name for name in state if name.startswith("text.")]
    before = {name: encoder.state_dict()[name].clone() for name in missing}
    for name in missing:
        del state[name]
    torch.save(state | {"decoder.weight": torch.zeros(2)}, tmp_path / "part.pt")
    report = load_weights(encoder, str(tmp_path / "part.pt"), architectures["vit"], SIZE)
    assert report.missing == sorted(missing) and report.unexpected == ["decoder.weight"]
    assert report.matched == sorted(set(encoder.state_dict()) - set(missing))
    assert all(encoder.state_dict()[name].equal(value) for name, value in before.items())
    for part in (
        f"{len(report.matched)} matched",
        "0 resized",
        f"{len(missing)} missing",
        "1 unexpected (decoder.weight)",
    ):
        assert part in report.summary()


@pytest.mark.parametrize("extra", [{}, {"logit_scale": torch.tensor(2.0)}])
def test_a_file_of_which_no_weight_fits_is_refused(extra: dict, architectures: dict[str, str], tmp_path: Path) -> None:
    """A temperature alone is no match either: every CLIP has one."""
    torch.save({"backbone.weight": torch.zeros(3), **extra}, tmp_path / "other.pt")
    encoder = build(architectures["vit"], SIZE)
    with pytest.raises(UserError, match=r"nothing in .*other\.pt"):
        load_weights(encoder, str(tmp_path / "other.pt"), architectures["vit"], SIZE)


@pytest.mark.parametrize("name", ["visual.conv1.weight", "visual.positional_embedding"])
def test_a_shape_that_does_not_fit_is_told_and_nothing_is_loaded(
    name: str, architectures: dict[str, str], tmp_path: Path
) -> None:
    state = dict(randomize(build(architectures["vit"], SIZE)).state_dict())
    state[name] = torch.zeros(10, 99) if name.endswith("embedding") else torch.zeros(4, 3, 2, 2)
    torch.save(state, tmp_path / "wide.pt")
    encoder = build(architectures["vit"], SIZE)
    before = encoder.state_dict()["visual.proj"].clone()
    with pytest.raises(UserError, match=rf"{name} in .*wide\.pt has shape .*wants"):
        load_weights(encoder, str(tmp_path / "wide.pt"), architectures["vit"], SIZE)
    assert encoder.state_dict()["visual.proj"].equal(before)


def test_a_logit_scale_of_many_elements_is_told(architectures: dict[str, str], tmp_path: Path) -> None:
    state = dict(build(architectures["vit"], SIZE).state_dict()) | {"logit_scale": torch.zeros(3)}
    torch.save(state, tmp_path / "scales.pt")
    with pytest.raises(UserError, match="logit_scale"):
        load_weights(build(architectures["vit"], SIZE), str(tmp_path / "scales.pt"), "vit.json", SIZE)


def test_a_folder_stands_for_the_weights_in_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path)["a"].equal(torch.ones(2))


def test_an_unknown_tag_is_told_without_the_network() -> None:
    with torch.device("meta"):
        encoder = build("ViT-B-32", (64, 64))
    with pytest.raises(UserError, match=r"no tag 'opanai'.*openai"):
        load_weights(encoder, "open_clip:opanai", "ViT-B-32", (64, 64))


def test_a_tag_of_the_other_activation_is_refused() -> None:
    with torch.device("meta"):
        encoder = build("ViT-B-32", (64, 64))
    with pytest.raises(UserError, match="quickgelu"):
        load_weights(encoder, "open_clip:openai", "ViT-B-32", (64, 64))


def test_a_tag_of_a_json_architecture_is_refused(architectures: dict[str, str]) -> None:
    encoder = build(architectures["vit"], SIZE)
    with pytest.raises(UserError, match=r"no tag 'openai'.*none"):
        load_weights(encoder, "open_clip:openai", architectures["vit"], SIZE)


def test_visual_names_are_never_moved_into_the_text_tower() -> None:
    names = [
        "text_projection",
        "positional_embedding",
        "transformer.a",
        "visual.transformer.a",
        "visual.positional_embedding",
    ]
    found = set(canonical_names({name: torch.zeros(1) for name in names}))
    assert found == {"text.text_projection", "text.positional_embedding", "text.transformer.a", *names[3:]}


def make_archive(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """A TorchScript archive of a CLIP, as OpenAI published theirs; returns its tensors."""
    clip = make_clip(config)
    traced = torch.jit.trace(clip, (images(), TOKENS), check_trace=False)
    torch.jit.save(traced, str(path))
    return dict(clip.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_archive_names_the_converter_whose_file_loads(
    architectures: dict[str, str], configs: dict, tmp_path: Path
) -> None:
    archive, target = tmp_path / "clip.pt", tmp_path / "clip.safetensors"
    state = make_archive(archive, configs["vit"])
    with pytest.raises(UserError, match=r"TorchScript.*`python -m reid_dist\.models\.convert_jit .*`") as refusal:
        read_state_dict(archive)
    # The very command of the message.
    command = str(refusal.value).split("`")[1].split()
    assert command[-2:] == [str(archive), str(target)]
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    converted = load_file(target)
    assert all(converted[name].equal(value) for name, value in state.items())
    encoder = build(architectures["vit"], SIZE)
    report = load_weights(encoder, str(target), architectures["vit"], SIZE)
    assert (report.missing, report.unexpected) == ([], [])
    assert encoder.state_dict()["text.token_embedding.weight"].equal(state["token_embedding.weight"])
    assert [file.name for file in tmp_path.glob("*.partial")] == []


def test_the_converter_tells_what_it_cannot_convert(tmp_path: Path) -> None:
    damaged, target = tmp_path / "damaged.pt", tmp_path / "out.safetensors"
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("damaged/constants.pkl", json.dumps("no archive"))
    for source, reason in ((damaged, "cannot convert"), (tmp_path / "absent.pt", "does not exist")):
        command = [sys.executable, "-m", "reid_dist.models.convert_jit", str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, target.exists()) == (2, False)
        assert reason in done.stderr and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
