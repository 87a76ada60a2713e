import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reid_dist.checkpoint import portable
from reid_dist.checkpoint.portable import fingerprint, read_export, save_export
from reid_dist.config import ModelConfig, RunConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.weights import load_weights

SIZE = (64, 32)


@pytest.fixture
def architecture(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    path.write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def make_encoder(architecture: str, seed: int) -> DualEncoder:
    torch.manual_seed(seed)
    return build_dual_encoder(ModelConfig(architecture=architecture, image_size=SIZE))


def full_state(encoder: DualEncoder) -> dict[str, Tensor]:
    """As a stage hands it over: the encoder beside a head that is not exported."""
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()} | {"head.weight": torch.ones(3)}


def save(folder: Path, architecture: str, seed: int = 0, words: list[str] | None = None) -> DualEncoder:
    encoder = make_encoder(architecture, seed)
    model = ModelConfig(architecture=architecture, image_size=SIZE, weights="somewhere")
    save_export(folder, full_state(encoder), model, words, {"stage": "t2i", "fingerprint": f"seed {seed}"})
    return encoder


# Exports


def test_weights_come_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    saved = save(tmp_path / "run" / "export", architecture)
    loaded = make_encoder(architecture, seed=1)
    assert not loaded.logit_scale.equal(saved.logit_scale) or not loaded.state_dict()["visual.proj"].equal(
        saved.state_dict()["visual.proj"]
    )
    report = load_weights(loaded, str(tmp_path / "run" / "export"), architecture, SIZE)
    assert (report.resized, report.missing, report.unexpected) == ([], [], [])
    assert set(report.matched) == set(saved.state_dict())
    for name, value in saved.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name


def test_the_manifest_says_what_was_exported(architecture: str, tmp_path: Path) -> None:
    save(tmp_path / "export", architecture, words=["red", "coat"])
    manifest = read_export(tmp_path / "export", verify=True)
    assert manifest is not None
    assert (manifest["stage"], manifest["fingerprint"], manifest["words"]) == ("t2i", "seed 0", ["red", "coat"])
    assert manifest["model"]["image_size"] == [64, 32] and "weights" not in manifest["model"]
    assert manifest["versions"]["torch"]
    found = sorted(file.name for file in (tmp_path / "export").iterdir())
    assert found == ["architecture.json", "manifest.json", "model.safetensors"]
    assert json.loads((tmp_path / "export" / found[0]).read_text()) == json.loads(Path(architecture).read_text())
    assert "head.weight" not in load_file(tmp_path / "export" / "model.safetensors")


def test_a_new_export_replaces_the_old_one_and_leaves_nothing_beside_it(architecture: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "export"
    save(folder, architecture, seed=0)
    (folder / "stray").touch()
    save(folder, architecture, seed=1)
    manifest = read_export(folder, verify=True)
    assert manifest is not None and manifest["fingerprint"] == "seed 1"
    assert [file.name for file in folder.parent.iterdir()] == ["export"]
    assert not (folder / "stray").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Makes a step of the writing fail, as a full disk or a kill would, after some of it is on the disk."""

    def half_written(state: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("killed")

    if where == "weights":
        monkeypatch.setattr(portable, "save_file", half_written)
    elif where == "manifest":
        monkeypatch.setattr(Path, "write_text", fail)
    elif where == "flush":
        monkeypatch.setattr(portable, "flush", fail)
    elif where == "rename":
        monkeypatch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("where", ["weights", "manifest", "flush", "rename"])
def test_an_interrupted_write_leaves_the_old_export_whole(
    where: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    save(folder, architecture, seed=0)
    with monkeypatch.context() as broken:
        interrupt(broken, where)
        with pytest.raises(OSError, match=r"space|killed"):
            save(folder, architecture, seed=1)
    manifest = read_export(folder, verify=True)
    assert manifest is not None and manifest["fingerprint"] == "seed 0"


@pytest.mark.parametrize("where", ["weights", "manifest", "flush", "rename"])
def test_an_interrupted_first_write_is_no_export_and_the_next_one_succeeds(
    where: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    with monkeypatch.context() as broken:
        interrupt(broken, where)
        with pytest.raises(OSError, match=r"space|killed"):
            save(folder, architecture)
    assert not folder.exists() and read_export(folder) is None
    save(folder, architecture)
    assert read_export(folder, verify=True) is not None
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == ["export"]


def test_no_folder_and_a_folder_without_a_manifest_are_no_export(tmp_path: Path) -> None:
    assert read_export(tmp_path / "absent") is None
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert read_export(tmp_path, verify=True) is None


def test_changed_weights_are_refused(architecture: str, tmp_path: Path) -> None:
    save(tmp_path / "export", architecture)
    weights = tmp_path / "export" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert read_export(tmp_path / "export") is not None  # without verify only the manifest is read
    with pytest.raises(UserError, match=r"model\.safetensors: does not match its hash"):
        read_export(tmp_path / "export", verify=True)


def test_missing_weights_are_told(architecture: str, tmp_path: Path) -> None:
    save(tmp_path / "export", architecture)
    (tmp_path / "export" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        read_export(tmp_path / "export", verify=True)


@pytest.mark.parametrize("content", ["{", "", "[]", "3", '{"format_version": 1}', '{"format_version": 99}', "\udcff"])
def test_a_damaged_manifest_is_told(content: str, architecture: str, tmp_path: Path) -> None:
    save(tmp_path / "export", architecture)
    (tmp_path / "export" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json|does not match its hash"):
        read_export(tmp_path / "export", verify=True)


# Fingerprints


def make_config(changes: dict[str, Any]) -> RunConfig:
    """A run of one T2I stage with dotted changes; `stage.` is the stage."""
    raw: dict[str, Any] = {
        "model": {"architecture": "ViT-B-16"},
        "stages": [{"name": "t2i", "kind": "t2i", "steps": 100, "data": {"train": ["cuhk_pedes"]}}],
    }
    for dotted, value in changes.items():
        parts = dotted.split(".")
        target = raw["stages"][0] if parts[0] == "stage" else raw
        parts = parts[1:] if parts[0] == "stage" else parts
        for part in parts[:-1]:
            target = target.setdefault(part, {})
        target[parts[-1]] = value
    return RunConfig.model_validate(raw)


def make_fingerprint(changes: dict[str, Any], previous: str = "") -> str:
    config = make_config(changes)
    return fingerprint(config, config.stages[0], previous)


RELEVANT = {
    "seed": 1,
    "max_steps": 50,
    "model.architecture": "ViT-B-32",
    "model.weights": "weights.pt",
    "model.image_size": [256, 128],
    "model.patch_stride": 12,
    "model.position_interpolation": "bicubic",
    "model.image_mean": [0.5, 0.5, 0.5],
    "model.sync_batch_norm": True,
    "stage.steps": 99,
    "stage.freeze": ["visual"],
    "stage.loss.positives": "pair",
    "stage.loss.queue_size": 64,
    "stage.loss.momentum": 0.9,
    "stage.data.train": ["icfg_pedes"],
    "stage.data.global_batch_size": 128,
    "stage.data.sampler": "identity",
    "stage.data.images_per_identity": 2,
    "stage.data.exclude": "exclude.txt",
    "stage.data.augment.erase": 0.5,
    "stage.optimizer.name": "sgd",
    "stage.optimizer.lr": 2e-5,
    "stage.optimizer.weight_decay": 0.3,
    "stage.optimizer.schedule": "constant",
    "stage.optimizer.warmup_steps": 7,
    "stage.optimizer.new_lr_multiplier": 5.0,
    "stage.engine.precision": "bf16",
    "stage.engine.gradient_accumulation_steps": 2,
    "stage.engine.max_grad_norm": 1.0,
}
IRRELEVANT = {
    "output_dir": "elsewhere",
    "log_every": 3,
    "max_steps": 500,  # above the stage's own steps
    "model.gradient_checkpointing": True,
    "model.vocabulary": "words.txt",  # its words count, see the test below
    "stage.data.root": "elsewhere",
    "stage.data.workers": 3,
    "stage.data.cache": True,
    "stage.data.identities": 11,
    "stage.evaluation.t2i": ["cuhk_pedes"],
    "stage.evaluation.i2i": ["market1501"],
    "stage.evaluation.split": "test",
    "stage.evaluation.batch_size": 7,
}


@pytest.mark.parametrize("key", RELEVANT)
def test_the_fingerprint_changes_with_what_decides_the_weights(key: str) -> None:
    assert make_fingerprint({key: RELEVANT[key]}) != make_fingerprint({})


@pytest.mark.parametrize("key", IRRELEVANT)
def test_the_fingerprint_stays_where_the_weights_do(key: str) -> None:
    assert make_fingerprint({key: IRRELEVANT[key]}) == make_fingerprint({})


def test_the_fingerprint_stays_however_a_queue_is_kept_and_checked() -> None:
    queue = {"stage.loss.queue_size": 64}
    kept = {"stage.loss.queue_sharded": True, "stage.loss.queue_check_every": 7}
    assert make_fingerprint(queue | kept) == make_fingerprint(queue)


def test_a_stage_s_fingerprint_depends_on_the_stage_before_it() -> None:
    assert make_fingerprint({}, previous="a") != make_fingerprint({}, previous="b")


def test_the_fingerprint_depends_on_what_the_data_holds() -> None:
    config = make_config({})
    found = {fingerprint(config, config.stages[0], "", data) for data in ((), ("a",), ("b",), ("a", "b"), ("b", "a"))}
    assert len(found) == 5


def test_a_cap_equals_as_many_steps() -> None:
    assert make_fingerprint({"max_steps": 50}) == make_fingerprint({"stage.steps": 50})
