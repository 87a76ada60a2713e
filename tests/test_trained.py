"""A trained model from its export alone, of every kind: the features of the encoder that was exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reid_dist
from reid_dist.checkpoint.portable import save_export
from reid_dist.config import ModelConfig
from reid_dist.data.tokenizer import Tokenizer, WordTokenizer
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dictionary import Dictionary, write_dictionary
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.trained import TrainedModel, find_export, load

SIZE = (64, 32)
WORDS = ["a", "person", "red", "blue", "coat"]
SENTENCES = ["a person in a red coat", "a blue coat, 10 o'clock"]
VISION = {
    "vit": {"image_size": 64, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "row_conv": {"row_conv": {"widths": [8, 16], "groups": 2, "rows": 4}},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
GRU = {"hidden": 6, "features": 8, "context_length": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "row_conv": ("row_conv", {}),
    "prompts": ("vit", {"prompts": {"visual_depth": 2, "text_depth": 1}, "patch_stride": 12}),
    "dual_token": ("vit", {"dual_token": True}),
    "learned_words": ("row_conv", {"word_gru": GRU}),
    "dictionary": ("resnet", {"word_gru": {**GRU, "dictionary": "of the test"}, "projection": 10, "last_stride": 1}),
    "projection": ("vit", {"projection": 10}),
}  # fmt: skip


def make(kind: str, folder: Path) -> tuple[DualEncoder, Tokenizer, Path]:
    """An encoder with its tokenizer, and its export in a folder that holds nothing else of what it was made from."""
    sources = folder / "sources"
    sources.mkdir(parents=True)
    vision, settings = KINDS[kind]
    architecture, vocabulary = sources / "model.json", sources / "words.txt"
    architecture.write_text(json.dumps({"embed_dim": 12, "vision_cfg": VISION[vision], "text_cfg": TEXT}))
    vocabulary.write_text("\n".join(WORDS) + "\n")
    model: dict[str, Any] = {"architecture": str(architecture), "image_size": SIZE, **settings}
    if "dictionary" in settings.get("word_gru", {}):
        path = sources / "words.safetensors"
        write_dictionary(path, Dictionary(WORDS, torch.randn(len(WORDS), 5)), "key")
        model["word_gru"] = {**settings["word_gru"], "dictionary": str(path)}
    else:
        model["vocabulary"] = str(vocabulary)
    config = ModelConfig.model_validate(model)
    torch.manual_seed(0)
    encoder = build_dual_encoder(config).eval()
    for parameter in encoder.parameters():  # towers with zeros at the start would hide what was not loaded
        parameter.data += 0.1 * torch.randn_like(parameter)
    shape = encoder.text_shape
    tokenizer = WordTokenizer(WORDS, shape.context_length, shape.vocab_size, framed="word_gru" not in settings)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_export(folder / "run" / "t2i" / "export", state, config, WORDS, {"stage": "t2i"})
    (folder / "run" / "config.yaml").write_text("stages: [{name: i2i}, {name: t2i}, {name: later}]\n")
    shutil.rmtree(sources)
    return encoder, tokenizer, folder / "run"


def pictures(count: int = 3) -> Tensor:
    make = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *SIZE, 3), dtype=torch.uint8, generator=make)


def unit(feature: Tensor) -> Tensor:
    return torch.nn.functional.normalize(feature.detach(), dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_encoder_that_was_exported(kind: str, tmp_path: Path) -> None:
    encoder, tokenizer, run = make(kind, tmp_path)
    model = reid_dist.load(run)
    image_NHWC = pictures()
    for task in ("t2i", "i2i"):
        expected = unit(encoder.encode_image(image_NHWC.permute(0, 3, 1, 2), task))
        found = model.encode_image([each.numpy() for each in image_NHWC], task, batch_size=2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode_text(SENTENCES), unit(encoder.encode_text(tokenizer(SENTENCES))))
    assert found.shape == (3, model.features) and found.dtype == torch.float32 and not found.requires_grad
    assert len(model.digest) == 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("row_conv", tmp_path_factory.mktemp("trained"))[2]


def test_the_last_finished_stage_counts_and_every_folder_of_it_will_do(run: Path) -> None:
    export = run / "t2i" / "export"
    assert {find_export(path) for path in (run, run / "t2i", export)} == {export}


def test_an_image_may_be_a_file_a_picture_or_an_array(run: Path, tmp_path: Path) -> None:
    model, array = load(run), pictures(1)[0].numpy()
    large = np.kron(array, np.ones((3, 3, 1), dtype=np.uint8))
    Image.fromarray(large).save(tmp_path / "person.png")
    features = [model.encode_image(each) for each in (tmp_path / "person.png", str(tmp_path / "person.png"), large)]
    features += [model.encode_image(Image.fromarray(large)), model.encode_image([large])]
    assert all(torch.equal(feature, features[0]) for feature in features)
    assert model.encode_image([]).shape == (0, model.features) == model.encode_text([]).shape


def test_a_file_is_read_as_search_reads_it(run: Path, tmp_path: Path) -> None:
    """Upright as its EXIF says, and of the size that telephones take."""
    model, exif = load(run), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright = Image.fromarray(np.kron(pictures(1)[0].numpy(), np.ones((40, 40, 1), dtype=np.uint8)))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(model.encode_image(tmp_path / "a.png"), model.encode_image(upright))
    Image.new("RGB", (3024, 4032), (90, 10, 10)).save(tmp_path / "large.jpg")
    assert model.encode_image(tmp_path / "large.jpg").shape == (1, model.features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "does not describe a model"),
        ({"model": {"image_size": "x"}}, r"model\.\w+"),
        ({"words": "absent"}, r"does not describe a model \(KeyError\('words'\)\)"),
        ({"words": 5}, "words: not a list of words"),
        ({"model": "absent"}, r"does not describe a model \(KeyError\('model'\)\)"),
    ],
)
def test_a_manifest_that_describes_no_model_is_told(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "export"
    shutil.copytree(run / "t2i" / "export", copy)
    manifest = {**json.loads((copy / "manifest.json").read_text()), **change}
    (copy / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v != "absent"}))
    with pytest.raises(UserError, match=rf"manifest\.json: {message}.*; export the run again"):
        load(copy)


def test_batches_change_nothing_and_long_sentences_are_cut(run: Path) -> None:
    model = load(run)
    images = [each.numpy() for each in pictures(5)]
    torch.testing.assert_close(
        model.encode_image(images, batch_size=2), model.encode_image(images), rtol=1e-5, atol=1e-6
    )
    thousand = " ".join(["red"] * 1000)
    assert torch.equal(model.encode_text(thousand), model.encode_text(" ".join(["red"] * 500)))
    assert model.is_cut(thousand)
    assert not any(model.is_cut(text) for text in ("red", "a red coat", "a red coat .", "a coat xyzzy", ""))


def test_wrong_input_is_told_in_one_line(run: Path, tmp_path: Path) -> None:
    model = load(run)
    with pytest.raises(UserError, match="a sentence is empty"):
        model.encode_text(["a person", " "])
    with pytest.raises(UserError, match=r"nothing\.jpg: cannot be read \(No such file"):
        model.encode_image(tmp_path / "nothing.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"text\.jpg: the image does not decode"):
        model.encode_image(tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="must be uint8"):
        model.encode_image(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(UserError, match="no exported model; name the folder of a run"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text("[]")
    with pytest.raises(UserError, match="not the settings of a run"):
        load(tmp_path)


def test_a_damaged_export_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    shutil.copytree(run / "t2i" / "export", copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="does not match its hash"):
        load(copy)


def test_a_model_that_diverged_says_so(run: Path) -> None:
    model: TrainedModel = load(run)
    next(model.encoder.text.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="nan or inf; it diverged"):
        model.encode_text("a person")


def test_the_package_offers_what_it_says_and_imports_nothing_before() -> None:
    assert set(reid_dist.__all__) == {"load", "TrainedModel"} and reid_dist.load is load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        reid_dist.lode  # noqa: B018
