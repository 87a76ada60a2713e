"""TextReID's towers through a whole run: words of an encoder, training, an export that needs no dictionary."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reid_dist.errors import UserError
from reid_dist.inputs import open_inputs, stage_fingerprints
from reid_dist.models.dictionary import read_dictionary
from reid_dist.models.word_gru import main
from reid_dist.recipe import run

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

WORDS = ("model.vocabulary=null", "model.word_gru.features=16", "model.word_gru.hidden=12", "model.projection=24")
WORDS += ("model.word_gru.context_length=30", "stages.pretrain.steps=0", "stages.i2i.steps=0", "log_every=1")


def build(vocabulary: Path, out: Path, seed: int = 0) -> Path:
    assert main(["build", str(vocabulary), "--random", "20", "--seed", str(seed), "--out", str(out)]) == 0
    return out


def scores(output_dir: Path, stage: str) -> dict:
    found: dict = json.loads((output_dir / stage / "metrics.json").read_text())
    return {task: found[task] for task in ("t2i", "i2i")}


@pytest.mark.slow
def test_a_run_with_a_dictionary_trains_and_its_export_holds_the_words(
    tiny_world: Path, tiny_recipe, tmp_path: Path, run_ranks
) -> None:
    dictionary = build(tiny_world / "vocabulary.txt", tmp_path / "words.safetensors")
    table_VW = read_dictionary(dictionary).table()
    config = tiny_recipe(tmp_path / "run", *WORDS, f"model.word_gru.dictionary={dictionary}", "max_steps=2")
    run_ranks(2, run, config)
    export = tmp_path / "run" / "t2i" / "export"
    state, manifest = load_file(export / "model.safetensors"), json.loads((export / "manifest.json").read_text())
    assert state["text.words"].equal(table_VW) and "encoder.text.words" in manifest["frozen"]
    assert manifest["words"] == read_dictionary(dictionary).words and "dictionary" not in manifest["model"]["word_gru"]
    dictionary.unlink()
    again = tiny_recipe(
        tmp_path / "again",
        *WORDS,
        f"model.word_gru.dictionary={export}",
        f"model.weights={export}",
        "stages.t2i.steps=0",
    )
    run_ranks(1, run, again)
    assert scores(tmp_path / "again", "t2i") == scores(tmp_path / "run", "t2i")


def test_the_tokenizer_is_the_dictionary_s_or_the_learned_words(tiny_world: Path, tiny_recipe, tmp_path: Path) -> None:
    dictionary = build(tiny_world / "vocabulary.txt", tmp_path / "words.safetensors")
    vocabulary = tiny_world / "vocabulary.txt"
    words = vocabulary.read_text().split()
    choices = (f"model.word_gru.dictionary={dictionary}",), (f"model.vocabulary={vocabulary}",)
    for choice in choices:
        inputs = open_inputs(tiny_recipe(tmp_path / "run", *WORDS, *choice), 1)
        token_L = inputs.tokenizer([" ".join(words[3:40])])[0]
        assert inputs.words == words and token_L.tolist() == list(range(5, 35))


def test_the_fingerprint_follows_the_vectors_and_not_their_place(tiny_world: Path, tiny_recipe, tmp_path: Path) -> None:
    vocabulary = tiny_world / "vocabulary.txt"
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dictionary = build(vocabulary, tmp_path / f"{name}.safetensors", seed)
        config = tiny_recipe(tmp_path / "run", *WORDS, f"model.word_gru.dictionary={dictionary}")
        found.append(stage_fingerprints(config, open_inputs(config, 1)))
    learned = tiny_recipe(tmp_path / "run", *WORDS, f"model.vocabulary={vocabulary}")
    found.append(stage_fingerprints(learned, open_inputs(learned, 1)))
    assert found[0] == found[1] and len({tuple(stages) for stages in found}) == 3


def test_the_fingerprint_follows_the_image_tower_s_file(tiny_recipe, tmp_path: Path) -> None:
    path = tmp_path / "visual.pt"
    found = []
    for value in (0.0, 0.0, 1.0):
        torch.save({"visual.stem.weight": torch.full((1,), value)}, path)
        config = tiny_recipe(tmp_path / "run", f"model.visual_weights={path}")
        found.append(stage_fingerprints(config, open_inputs(config, 1)))
    assert found[0] == found[1] != found[2]
    path.unlink()
    with pytest.raises(UserError, match=r"model\.visual_weights: .*visual\.pt does not exist"):
        open_inputs(config, 1)


def test_a_dictionary_that_is_gone_is_told_before_anything_runs(tiny_recipe, tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path / "run", *WORDS, f"model.word_gru.dictionary={tmp_path / 'gone.safetensors'}")
    with pytest.raises(UserError, match=r"word_gru\.dictionary: .*gone\.safetensors cannot be read"):
        open_inputs(config, 1)
