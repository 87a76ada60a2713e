"""The weights as safetensors and as torch's file: whole, without heads, and read without unpickling."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from reid_dist import load
from reid_dist.checkpoint.portable import read_handover
from reid_dist.errors import UserError
from reid_dist.export.tensors import write_safetensors, write_torch
from reid_dist.models.dictionary import read_dictionary
from tests.export.models import WORDS, export_model

GRU = {"hidden": 6, "features": 8, "context_length": 8}
SENTENCES = ["a person in a red coat", "blue"]


@pytest.mark.parametrize("kind", [{"words": True, "vision": "row_conv"}, {"word_gru": GRU, "projection": 10}, {}])
def test_the_safetensors_export_is_loaded_without_its_sources_or_a_pickle(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(export_model(tmp_path / "run", **kind))
    (tmp_path / "out").mkdir()
    write_safetensors(model, tmp_path / "out")
    expected = model.encode_text(SENTENCES)
    (tmp_path / "run").rename(tmp_path / "gone")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    again = load(tmp_path / "out")
    monkeypatch.undo()
    assert again.digest == model.digest and torch.equal(again.encode_text(SENTENCES), expected)
    told = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in told and json.loads(told)["words"] == (WORDS if kind else None)
    if "word_gru" in kind:
        assert read_dictionary(tmp_path / "out").words == WORDS


def test_heads_and_what_is_handed_on_stay_behind(tmp_path: Path) -> None:
    export = export_model(tmp_path / "run", "row_conv", words=True)
    assert read_handover(export)  # what the next stage gets is about single people
    (tmp_path / "out").mkdir()
    write_safetensors(load(export), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "manifest.json", "architecture.json"
    }  # fmt: skip
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"visual", "text", "logit_scale"}  # noqa: SIM118
    assert read_handover(tmp_path / "out") == {}


def test_torch_s_file_holds_tensors_alone(tmp_path: Path) -> None:
    model = load(export_model(tmp_path / "run", "row_conv", words=True))
    (tmp_path / "out").mkdir()
    notes = write_torch(model, tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    own = model.encoder.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)
    assert notes["words"] == WORDS and "row_conv" in notes["architecture"]["vision_cfg"]
    assert str(tmp_path) not in json.dumps(notes)


def test_weights_that_change_while_they_are_copied_are_not_exported(tmp_path: Path) -> None:
    export = export_model(tmp_path / "run", "row_conv", words=True)
    model = load(export)
    with (export / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="was changed while it was copied"):
        write_safetensors(model, tmp_path / "out")


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="unexpected pos 64 vs 0"):
        write_torch(load(export_model(tmp_path / "run", "row_conv", words=True)), tmp_path)
