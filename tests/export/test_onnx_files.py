"""ONNX files: onnxruntime alone gives the features of torch, for batches of any size."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist import load
from reid_dist.data.tokenizer import split_words
from reid_dist.errors import UserError
from reid_dist.export import onnx_files
from reid_dist.export.command import main
from reid_dist.export.onnx_files import text_notes, write_onnx
from reid_dist.trained import TrainedModel
from tests.export.models import SIZE, WORDS, export_model

onnx = pytest.importorskip("onnx", reason="the extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")

# A translation takes two seconds of processor time: few models, each with many parts. Every export checks itself.
PROMPTS = {"visual_depth": 2, "text_depth": 1}
GRU = {"hidden": 6, "features": 8, "context_length": 8}
KINDS: dict[str, dict[str, Any]] = {
    "transformers": {"prompts": PROMPTS, "dual_token": True, "patch_stride": 12, "projection": 10},
    "convolutions": {"vision": "row_conv", "word_gru": GRU},
}
SENTENCES = ["a red coat", "a" + " blue" * 500, "a person in red", "red", "no word of these", "a", "blue coat"]


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedModel, Path, Any]:
    """A model, its files in a folder of their own, and the notes; the second with weights beside the files."""
    folder, large = tmp_path_factory.mktemp("onnx"), request.param == "convolutions"
    model = load(export_model(folder / "run", words=not large, **KINDS[request.param]))
    (folder / "first").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "_ONE_FILE_BYTES", 0 if large else 2_000_000_000)
        difference, notes = write_onnx(model, folder / "first", 18 if large else None)
    assert difference <= 1e-4
    assert len(list((folder / "first").glob("*.onnx.data"))) == (2 if large else 0)
    return model, (folder / "first").rename(folder / "moved"), notes


def run(folder: Path, name: str, value: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
    return [torch.from_numpy(found) for found in session.run(None, {name: value.numpy()})]


def test_onnxruntime_gives_the_features_of_torch(written: tuple[TrainedModel, Path, Any]) -> None:
    model, folder, notes = written
    for count in (1, 2, 7):
        image_NCHW = torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8)
        arrays = [image.permute(1, 2, 0).numpy() for image in image_NCHW]
        found = dict(zip(notes["image"]["outputs"], run(folder, "image", image_NCHW), strict=True))
        expected = {"feature": model.encode_image(arrays, "t2i"), "feature_i2i": model.encode_image(arrays, "i2i")}
        assert set(found) == ({"feature", "feature_i2i"} if model.encoder.has_i2i_token else {"feature"})
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
        (text,) = run(folder, "text", model.tokenizer(SENTENCES[:count]))
        torch.testing.assert_close(text, model.encode_text(SENTENCES[:count]), rtol=0, atol=1e-4)
    if model.encoder.has_i2i_token:
        assert not torch.allclose(found["feature"], found["feature_i2i"], atol=1e-2)


def test_the_files_know_nothing_of_this_machine(written: tuple[TrainedModel, Path, Any]) -> None:
    folder = written[1]
    for path in folder.glob("*.onnx"):
        data = path.read_bytes()
        assert str(Path.cwd()).encode() not in data and b"site-packages" not in data and b".py" not in data
        assert onnx.load(path).opset_import[0].version == written[2]["opset"]
    assert written[2]["opset"] == 18 or not list(folder.glob("*.data"))


def test_the_notes_are_enough_to_make_the_tokens(written: tuple[TrainedModel, Path, Any]) -> None:
    model, _, notes = written
    told = json.loads(json.dumps(notes))["text"]
    how, length = told["tokenizer"], model.tokenizer.context_length
    assert told["input"] == f"int64 (batch, {length})" and how["words"] == WORDS
    ids = {word: how["first_word"] + place for place, word in enumerate(how["words"])}
    for sentence in (*SENTENCES, told["example"]["sentence"]):
        frame = [how[key] for key in ("start", "end") if how[key] is not None]
        row = [ids.get(word, how["unknown"]) for word in split_words(sentence)][: length - len(frame)]
        row = [*frame[:1], *row, *frame[1:]]
        row += [how["pad"]] * (length - len(row))
        assert row == model.tokenizer([sentence])[0].tolist()
    assert told["example"]["tokens"] == model.tokenizer([told["example"]["sentence"]])[0].tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return load(export_model(tmp_path_factory.mktemp("small"), "row_conv", words=True))


@pytest.mark.parametrize("written", ["transformers"], indirect=True)
def test_another_result_is_refused(written: tuple[TrainedModel, Path, Any], tmp_path: Path) -> None:
    folder = written[1]
    image = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    features = run(folder, "image", image)

    def check(*wrong: float) -> float:
        expected = tuple(feature + error for feature, error in zip(features, (0.0, *wrong), strict=False))
        return onnx_files._check(folder / "image.onnx", "image", image, {1: expected})

    assert check(0.0) == 0 and check(9e-5) == pytest.approx(9e-5, rel=0.01)  # of the second output
    with pytest.raises(UserError, match=r"the image encoder's features differ by 1\.[12]e-04 from torch's, more than"):
        check(1.1e-4)
    with pytest.raises(UserError, match="differ by nan"):
        check(float("nan"))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="onnxruntime cannot run the image encoder") as refusal:
        onnx_files._check(tmp_path / "broken.onnx", "image", image, {})
    assert "\n" not in str(refusal.value)


class StaleProgram:
    """What torch might make of a model: the file of another one."""

    def __init__(self, path: Path, opset: int) -> None:
        self.path, self.model, self.opset_imports, self.graph = path, self, {"": opset}, self

    def all_nodes(self) -> list[Any]:
        return []

    def save(self, path: Path, external_data: bool) -> None:
        shutil.copyfile(self.path, path)


@pytest.mark.parametrize("written", ["transformers"], indirect=True)
def test_a_file_of_another_model_never_appears(tmp_path: Path, capsys: Any, monkeypatch: Any, written: Any) -> None:
    _, folder, notes = written
    stale = StaleProgram(folder / "image.onnx", notes["opset"])
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: stale)
    settings = {**KINDS["transformers"], "image_mean": (0.1, 0.1, 0.1)}
    other = export_model(tmp_path / "run", words=True, **settings)
    assert main([str(other), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "the image encoder's features differ by" in capsys.readouterr().err
    assert main([str(other), "--format", "onnx", "--out", str(tmp_path / "out"), "--opset", "19"]) == 2
    assert "--opset 19: torch writes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_torch_cannot_translate_is_refused(small: TrainedModel, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"cannot translate the image encoder \(no such operator\); choose"):
        write_onnx(small, tmp_path, None)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_its_extra(small: TrainedModel, tmp_path: Path, monkeypatch: Any, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as refusal:
        write_onnx(small, tmp_path, None)
    assert str(refusal.value) == f"--format onnx: {package} is missing: install the extra: pip install -e '.[export]'"


def test_clip_s_tokenizer_is_named(tmp_path: Path) -> None:
    notes = text_notes(load(export_model(tmp_path)))
    assert "open_clip" in notes["tokenizer"]["kind"] and notes["example"]["tokens"][0] == 49406
