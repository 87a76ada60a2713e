"""The builder of dictionaries: each kind of encoder against its own forward, the cache, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from reid_dist.checkpoint.portable import save_export
from reid_dist.config import ModelConfig
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.models import word_sources
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dictionary import read_dictionary
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.word_gru import build_dictionary, main
from reid_dist.models.word_sources import RandomSource, TowerSource

WORDS = ["red", "backpack", "woman", "sneakers", "xylophonist"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("".join(word + "\n" for word in WORDS))
    return tmp_path / "words.txt"


def make_encoder(architecture: str, **settings: Any) -> tuple[DualEncoder, ModelConfig]:
    torch.manual_seed(0)
    model = ModelConfig(architecture=architecture, image_size=(64, 64), **settings)
    encoder = build_dual_encoder(model).eval()
    for parameter in encoder.text.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder, model


def save(encoder: DualEncoder, path: Path) -> Path:
    torch.save(encoder.state_dict(), path)
    return path


def build(vocabulary: Path, *options: object) -> Tensor:
    out = vocabulary.with_name("out.safetensors")
    assert main(["build", str(vocabulary), "--out", str(out), *map(str, options)]) == 0
    found = read_dictionary(out)
    assert found.words == WORDS
    return found.vectors_NW


# Text towers


def test_a_word_is_its_end_token_s_state_behind_the_projection(vocabulary, architectures, tmp_path: Path) -> None:
    encoder, _ = make_encoder(architectures["vit"])
    own = ["red", "woman", "sneakers", "backpack"]
    (tmp_path / "own.txt").write_text("\n".join(own))
    file = save(encoder, tmp_path / "weights.pt")
    vectors_NW = build(
        vocabulary, "--weights", file, "--architecture", architectures["vit"], "--words", tmp_path / "own.txt"
    )
    text: Any = encoder.text
    for word, vector in zip(WORDS, vectors_NW, strict=True):
        token_L = torch.tensor([2, own.index(word) + 3 if word in own else 1, 49])
        x = (text.token_embedding(token_L) + text.positional_embedding[:3])[None]
        state = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:3, :3]))[0, 2]
        torch.testing.assert_close(vector, state @ text.text_projection, rtol=1e-4, atol=1e-5)


def test_an_open_clip_architecture_brings_its_own_tokenizer(vocabulary, tmp_path: Path, configs) -> None:
    config = configs["vit"]
    config["text_cfg"] = {**config["text_cfg"], "vocab_size": 49408, "context_length": 9}
    (tmp_path / "bpe.json").write_text(json.dumps(config))
    encoder, _ = make_encoder(str(tmp_path / "bpe.json"))
    file = save(encoder, tmp_path / "weights.pt")
    vectors_NW = build(vocabulary, "--weights", file, "--architecture", tmp_path / "bpe.json")
    tokens = open_clip.SimpleTokenizer(context_length=9)(WORDS)
    torch.testing.assert_close(vectors_NW, encoder.encode_text(tokens).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "row_conv", "prompts"])
def test_an_exported_stage_brings_architecture_and_words(kind: str, vocabulary, architectures, tmp_path: Path) -> None:
    prompts = {"visual_length": 0, "text_length": 2, "text_depth": 1}
    settings: dict[str, Any] = {"prompts": prompts} if kind == "prompts" else {}
    encoder, model = make_encoder(architectures["vit" if kind == "prompts" else kind], **settings)
    own = [*WORDS[::-1], "other"]
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_export(tmp_path / "export", state, model, own, {})
    shape = encoder.text_shape
    tokens = WordTokenizer(own, shape.context_length, shape.vocab_size)(WORDS)
    expected = encoder.encode_text(tokens).detach()
    torch.testing.assert_close(build(vocabulary, "--weights", tmp_path / "export"), expected, rtol=1e-4, atol=1e-5)


def test_an_exported_stage_of_words_and_gru_can_read_words_too(vocabulary, architectures, tmp_path: Path) -> None:
    main(["build", str(vocabulary), "--random", "6", "--out", str(tmp_path / "first.safetensors")])
    setting = {"dictionary": tmp_path / "first.safetensors", "features": 6, "hidden": 5, "context_length": 7}
    encoder, model = make_encoder(architectures["row_conv"], word_gru=setting)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_export(tmp_path / "export", state, model, WORDS, {})
    (tmp_path / "first.safetensors").unlink()  # the export holds its words
    tokens = torch.arange(2, 7)[:, None]
    expected = encoder.encode_text(tokens).detach()
    torch.testing.assert_close(build(vocabulary, "--weights", tmp_path / "export"), expected, rtol=1e-5, atol=1e-6)


def test_words_that_the_encoder_lacks_are_counted(vocabulary, architectures, tmp_path: Path, capsys) -> None:
    encoder, _ = make_encoder(architectures["vit"])
    (tmp_path / "own.txt").write_text("red\nwoman")
    file = save(encoder, tmp_path / "weights.pt")
    build(vocabulary, "--weights", file, "--architecture", architectures["vit"], "--words", tmp_path / "own.txt")
    assert "3 of the words are unknown to the encoder" in capsys.readouterr().out


# The cache


def test_what_is_up_to_date_is_left_as_it_is(vocabulary, architectures, tmp_path: Path, capsys) -> None:
    encoder, _ = make_encoder(architectures["vit"])
    (tmp_path / "own.txt").write_text("\n".join(WORDS))
    file = save(encoder, tmp_path / "weights.pt")
    options = ("--weights", file, "--architecture", architectures["vit"], "--words", tmp_path / "own.txt")
    first, out = build(vocabulary, *options), tmp_path / "out.safetensors"
    stamp = out.stat().st_mtime_ns
    build(vocabulary, *options)
    assert out.stat().st_mtime_ns == stamp and "(was up to date)" in capsys.readouterr().out
    with torch.no_grad():
        encoder.text.positional_embedding.add_(1)
    save(encoder, file)
    assert not build(vocabulary, *options).equal(first)


def test_other_words_or_another_choice_are_computed(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert build_dictionary(["a", "b"], RandomSource(4), out)
    assert not build_dictionary(["a", "b"], RandomSource(4), out)
    assert build_dictionary(["b", "a"], RandomSource(4), out)
    assert build_dictionary(["b", "a"], RandomSource(4, seed=1), out)
    assert build_dictionary(["b", "a"], RandomSource(5, seed=1), out)
    assert read_dictionary(out).vectors_NW.shape == (2, 5)


def test_batches_change_nothing(architectures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = make_encoder(architectures["vit"])
    (tmp_path / "own.txt").write_text("\n".join(WORDS))
    source = TowerSource(str(save(encoder, tmp_path / "w.pt")), architectures["vit"], tmp_path / "own.txt")
    whole = source.vectors(WORDS)
    monkeypatch.setattr(word_sources, "_BATCH", 2)
    torch.testing.assert_close(source.vectors(WORDS), whole, rtol=1e-5, atol=1e-6)


# Refusals


def refused(vocabulary: Path, capsys, *options: object) -> str:
    out = vocabulary.with_name("out.safetensors")
    assert main(["build", str(vocabulary), "--out", str(out), *map(str, options)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ") and not out.exists()
    return str(message)


def test_wrong_input_is_told_in_one_line(vocabulary, architectures, tmp_path: Path, capsys) -> None:
    encoder, _ = make_encoder(architectures["vit"])
    file = save(encoder, tmp_path / "weights.pt")
    assert "also give --architecture" in refused(vocabulary, capsys, "--weights", file)
    absent = tmp_path / "absent.pt"
    assert "does not exist" in refused(vocabulary, capsys, "--weights", absent, "--architecture", architectures["vit"])
    (tmp_path / "folder").mkdir()
    assert "is no exported stage of ours" in refused(vocabulary, capsys, "--weights", tmp_path / "folder")
    half = {name: x for name, x in encoder.state_dict().items() if name != "text.ln_final.weight"}
    torch.save(half, file)
    (tmp_path / "own.txt").write_text("red")
    options = ("--weights", file, "--architecture", architectures["vit"], "--words", tmp_path / "own.txt")
    assert "does not fill the text tower" in refused(vocabulary, capsys, *options)
    with torch.no_grad():
        encoder.text.ln_final.weight.fill_(torch.nan)
    save(encoder, file)
    assert "nan or inf" in refused(vocabulary, capsys, *options)
    vocabulary.write_text("")
    assert "no words" in refused(vocabulary, capsys, "--random", 3)
    vocabulary.write_text("two words\n")
    assert "not one lower-case word" in refused(vocabulary, capsys, "--random", 3)


# Hugging Face


def test_a_missing_transformers_is_told(vocabulary, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs the package transformers; install it with" in refused(vocabulary, capsys, "--hf", tmp_path)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT with next to no weights, in a folder as Hugging Face's hub has it."""
    reason = "transformers is not installed (extra hf): needed for word vectors of Hugging Face models"
    transformers = pytest.importorskip("transformers", reason=reason)
    folder = tmp_path / "bert"
    folder.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "woman", "back", "##pack", "sneak", "##ers"]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(pieces), max_position_embeddings=16, **size)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layers", ["mean4", "concat4", "second_last", "last"])
def test_a_word_of_a_hugging_face_model_is_the_mean_over_its_pieces(layers: str, bert, vocabulary) -> None:
    import transformers

    vectors_NW = build(vocabulary, "--hf", bert, "--layers", layers)
    model = transformers.BertModel.from_pretrained(bert).eval()
    pieces = {"red": [5], "backpack": [7, 8], "woman": [6], "sneakers": [9, 10], "xylophonist": [1]}
    for word, vector in zip(WORDS, vectors_NW, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([[2, *pieces[word], 3]]), output_hidden_states=True).hidden_states
        assert len(states) == 6
        expected = {
            "mean4": (states[2] + states[3] + states[4] + states[5]) / 4,
            "concat4": torch.cat([states[2], states[3], states[4], states[5]], dim=2),
            "second_last": states[4],
            "last": states[5],
        }[layers]
        torch.testing.assert_close(vector, expected[0, 1:-1].mean(0), rtol=1e-4, atol=1e-5)


def test_a_folder_without_a_model_or_safetensors_is_refused(bert: Path, vocabulary, capsys, tmp_path: Path) -> None:
    assert "holds no config.json" in refused(vocabulary, capsys, "--hf", tmp_path)
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    assert "cannot be read as a text model with safetensors" in refused(vocabulary, capsys, "--hf", bert)


def test_what_a_hugging_face_model_reads_as_unknown_is_counted(bert: Path, vocabulary, capsys) -> None:
    build(vocabulary, "--hf", bert)
    assert "1 of the words are unknown" in capsys.readouterr().out
