"""python -m reid_dist.checkpoint: what is there, whether it is sound, and the encoder out of the middle of a stage."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reid_dist
from reid_dist.checkpoint.command import main
from reid_dist.checkpoint.manifest import step_folder
from reid_dist.checkpoint.private import BUFFER, Private
from reid_dist.config import ModelConfig
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.pieces import shared_out
from tests.checkpoint import states

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with steps 1 to 3 of a stage."""
    states.save(tmp_path / "run" / "pretrain" / "checkpoints", 1, 2, 3)
    return tmp_path / "run"


def steps(run: Path) -> Path:
    return run / "pretrain" / "checkpoints"


def test_inspect_lists_the_checkpoints_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run, run / "pretrain", steps(run)):
        assert main(["inspect", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0] for line in lines] == [str(step_folder(steps(run), step)) for step in (1, 2, 3)]
        assert lines[0].endswith(": pretrain after step 1 of 100, loss 99.0000, 0.0 MB of 1 ranks")
        assert [line.endswith(", latest") for line in lines] == [False, False, True]


def test_inspect_tells_of_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(step_folder(steps(run), 2))]) == 0
    text = capsys.readouterr().out
    for words in ("after step 2 of 100", "samples      32", "weight decay 0.1", "queue: 2 tensors, 0.0 MB, ", "torch"):
        assert words in text


def test_verify_finds_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": good, ") == 3
    path = step_folder(steps(run), 2) / "rank-00000-of-00001.json"
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    assert main(["verify", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out.count(": good, ") == 2
    assert err.count("\n") == 1 and str(path) in err
    assert main(["verify", str(step_folder(steps(run), 2))]) == 2
    assert main(["verify", str(step_folder(steps(run), 1))]) == 0
    (steps(run) / "latest").write_text("")
    assert main(["verify", str(run)]) == 2
    assert f"{steps(run)}/latest: empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
def test_wrong_input_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = ["--out", str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(tmp_path / "absent"), *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/absent: no checkpoint there; name the folder of a run, of a stage, or of a step"
    ]


def test_it_is_a_command(tmp_path: Path) -> None:
    typed = [sys.executable, "-m", "reid_dist.checkpoint", "verify", str(tmp_path)]
    done = subprocess.run(typed, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_refusals_of_an_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states.save(run / "t2i" / "checkpoints", 1)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").touch()
    for path, out, words in (
        (run, tmp_path / "out", "several stages have checkpoints"),
        (run / "t2i", tmp_path / "export", "is there already"),
        (tmp_path / "export", tmp_path / "out", "an export, no checkpoint"),
    ):
        assert main(["export", str(path), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _tiny_encoder() -> tuple[DualEncoder, ModelConfig]:
    architecture = ROOT / "configs" / "models" / "row_conv_tiny.json"
    model = ModelConfig.model_validate({"architecture": str(architecture), "image_size": (64, 32), "vocabulary": "x"})
    torch.manual_seed(0)
    return build_dual_encoder(model).eval(), model


def test_the_encoder_of_the_latest_step_is_loaded_from_its_export(tmp_path: Path) -> None:
    encoder, model = _tiny_encoder()
    trainable = {f"encoder.{name}": x for name, x in encoder.named_parameters() if "text" not in name}
    frozen = {f"encoder.{name}": x for name, x in encoder.named_parameters() if "text" in name}
    head = {"head.weight": torch.ones(3)}
    pieces = [
        piece
        for part, table in (("weights", {**trainable, **head}), ("frozen", frozen), ("exp_avg", trainable))
        for name, x in table.items()
        for piece in shared_out(part, name, x.detach())
    ]
    buffers = {f"{BUFFER}encoder.{name}": x for name, x in encoder.named_buffers() if name in encoder.state_dict()}
    checkpoints = states.writer(tmp_path / "run" / "t2i" / "checkpoints")
    record = {**states.record(7), "model": model.model_dump(mode="json"), "words": ["a", "red", "coat"]}
    checkpoints.save(7, pieces, Private(buffers), record, wait=True)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    shutil.rmtree(tmp_path / "run")
    loaded = reid_dist.load(tmp_path / "out", "cpu")
    assert loaded.manifest["steps"] == 7 and "after step 7 of 100" in loaded.manifest["fingerprint"]
    found = loaded.encoder.state_dict()
    assert found.keys() == encoder.state_dict().keys()
    assert all(torch.equal(found[name], x) for name, x in encoder.state_dict().items())
    assert loaded.encode_text("a red coat").shape == (1, loaded.features)
