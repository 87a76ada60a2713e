"""`launch/export.py`: what it writes, what it says, what it refuses, and the card beside the weights."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reid_dist import load
from reid_dist.checkpoint.portable import file_sha256
from reid_dist.export.command import FORMATS, main
from tests.export.models import export_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "run"
    export_model(folder, "row_conv", words=True)
    return folder


def test_the_launcher_writes_a_folder_that_load_reads(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments = [str(run / "t2i"), "--format", "safetensors", "--out", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launch" / "export.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "model.safetensors" in said and "lies in no run" in said
    model, told = load(tmp_path / "a"), json.loads((tmp_path / "a" / "export.json").read_text())
    assert model.digest == told["sha256"] == load(run / "t2i").digest and told["format"] == "safetensors"
    assert set(told["files"]) == {"README.md", "architecture.json", "manifest.json", "model.safetensors"}
    assert "`python launch/export.py RUN" in (ROOT / "launch" / "export.py").read_text()


def test_a_second_export_replaces_the_first(run: Path, tmp_path: Path) -> None:
    for form in ("torch", "safetensors", "torch"):
        assert main([str(run / "t2i"), "--format", form, "--out", str(tmp_path / "a")]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"README.md", "export.json", "model.pt"}


def test_the_folder_one_is_in_and_links_are_written_to(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    arguments = [str(run / "t2i"), "--format", "torch", "--out"]
    monkeypatch.chdir(tmp_path / "empty")
    assert main([*arguments, "."]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "empty") in said and "model.pt" in said and "enter it again: cd ." in said
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "link"]) == 0 == main([*arguments, "link/../empty/"])
    assert "enter it again" not in capsys.readouterr().out
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "model.pt").is_file()
    (tmp_path / "dangling").symlink_to("new")
    assert main([*arguments, "dangling"]) == 0
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "new" / "model.pt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "link", "new"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--format", "torch", "--out", "OUT"], "nowhere: no exported model; name the folder of a run"),
        (["RUN", "--format", "torch", "--out", "RUN"], "holds the model that is to be exported"),
        (["RUN", "--format", "torch", "--out", "OUT", "--opset", "18"], "--opset 18: only --format onnx"),
        (["RUN", "--format", "open_clip", "--out", "OUT"], "open_clip has no tokenizer by a word list"),
    ],
)
def test_wrong_input_gets_one_line_and_nothing_is_written(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(run / "t2i"), "OUT": str(tmp_path / "deep" / "out")}
    assert main([places.get(each, each) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "deep" / "out").exists() and not list(tmp_path.rglob(".out*"))
    assert load(run / "t2i")


def test_a_full_disk_is_no_wrong_input(run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reid_dist.export.command.write_safetensors", full)
    assert main([str(run / "t2i"), "--format", "safetensors", "--out", str(tmp_path / "a")]) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_that_diverged_is_not_exported(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = export_model(tmp_path / "run", "row_conv", words=True)
    state = load_file(export / "model.safetensors")
    state["visual.stem.weight"][0] = torch.nan
    save_file(state, export / "model.safetensors")
    manifest = json.loads((export / "manifest.json").read_text())
    manifest["sha256"] = file_sha256(export / "model.safetensors")
    (export / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(export), "--format", form, "--out", str(tmp_path / "a")]) == 2
    assert "visual.stem.weight holds nan or inf" in capsys.readouterr().err and not (tmp_path / "a").exists()
