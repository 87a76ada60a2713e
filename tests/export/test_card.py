"""The model card: licences of the training data, recipe, scores, uses; what comes from data stays text."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from reid_dist import load
from reid_dist.data.sample import Manifest, SplitCounts
from reid_dist.export.card import earlier_card, escape, model_card
from reid_dist.export.command import main
from reid_dist.export.provenance import find_provenance
from reid_dist.recipe_file import dump_config, load_config
from tests.export.models import export_model
from tests.recipe_text import RECIPE

HOSTILE = "<script>alert(1)</script> | [x](http://evil) ![](http://evil) `code`\n# heading " + "long " * 200


def write_shards(folder: Path, name: str, **card: Any) -> None:
    counts = SplitCounts(images=1234, identities=56, captions=0, cameras=6)
    folder.mkdir(parents=True)
    manifest = Manifest(dataset=name, shards=[], identities=[], splits={"train": counts}, card=card)
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def make_run(folder: Path, **changes: str) -> Path:
    """A run of three stages, of which the second is the last that finished; without one of its training sets."""
    export = export_model(folder, "row_conv", words=True)
    export.parent.rename(folder / "i2i")
    (folder / "recipe.yaml").write_text(RECIPE)
    overrides = [f"data.root={folder.parent / 'shards'}", *(f"{key}={value}" for key, value in changes.items())]
    (folder / "config.yaml").write_text(dump_config(load_config(folder / "recipe.yaml", overrides)))
    metrics = {"R1": 12.34, "R5": 23.45, "R10": 34.5, "mAP": 45.6, "mINP": 5.0, "neighbours": 5, "weight": 0.05}
    told = {"split": "test", "t2i": {"cuhk_pedes": metrics | {"R1": 11.0}}, "i2i": {}, "t2i_reranked": {}}
    del told["t2i"]["cuhk_pedes"]["neighbours"]
    told["t2i_reranked"]["cuhk_pedes"] = metrics
    (folder / "i2i" / "metrics.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    market = {
        "title": "Market-1501",
        "licence": "academic research only",
        "citation": "Zheng et al. 2015",
        "source": HOSTILE,
    }
    write_shards(root / "shards" / "market1501", "market1501", **market)
    folder = make_run(root / "first")
    digest = load(folder).digest
    record = {
        "decides": {"model": digest}, "task": "i2t", "benchmark": "/data/icfg_pedes", "split": "val",
        "reranking": {"neighbours": 7}, "metrics": {"R1": 77.77, "R5": 1, "R10": 1, "mAP": 1, "mINP": 1},
    }  # fmt: skip
    (folder / "i2i" / "evaluation").mkdir()
    (folder / "i2i" / "evaluation" / "good.json").write_text(json.dumps(record))
    stale = {**record, "decides": {"model": "other weights"}, "metrics": {**record["metrics"], "R1": 66.66}}
    (folder / "i2i" / "evaluation" / "stale.json").write_text(json.dumps(stale))
    (folder / "i2i" / "evaluation" / "damaged.json").write_text("{")
    return folder


def card_of(run: Path, form: str = "safetensors") -> tuple[str, list[str]]:
    model = load(run)
    provenance = find_provenance(model.folder, model.digest)
    return model_card(model, provenance, form), list(provenance.problems)


def test_the_card_tells_data_licences_recipe_and_metrics(run: Path) -> None:
    card, problems = card_of(run)
    row = next(line for line in card.splitlines() if line.startswith("| i2i | market1501"))
    assert "(Market-1501)" in row and "1,234 images, 56 identities" in row and "academic research only" in row
    assert "consent" in card and "not stated" in row and "- Zheng et al. 2015" in card
    assert "| pretrain | generic |" in card and "not known: no card was found" in card
    assert len(problems) == 1 and "generic/manifest.json: cannot be read" in problems[0]
    assert "| pretrain | pretrain | 100 | 32 | adamw |" in card and "| i2i | i2i | 50 | 32 | adamw | 0.0003 |" in card
    assert "second" not in card and "triplet_margin: 0.5" in card  # the stage after it has no part in the weights
    assert "| t2i | cuhk\\_pedes | test | cosine | 11.0 | 23.4 | 34.5 | 45.6 | 5.0 |" in card
    assert "re-ranked: 5 neighbours, weight 0.05 | 12.3 |" in card
    assert "| i2t | icfg\\_pedes | val | re-ranked: neighbours 7 | 77.8 |" in card and "66.7" not in card
    assert "## Intended use" in card and "Covert tracking" in card and "identity classifiers" in card
    assert load(run).digest in card and "random weights" in card
    assert str(run.parent) not in card


def test_what_comes_from_data_stays_text(run: Path) -> None:
    card, _ = card_of(run)
    assert "<script" not in card and "\n# heading" not in card and "long long" in card
    assert not re.search(r"(?<!\\)[\]`!](\(http|\[|code)", card)
    row = next(line for line in card.splitlines() if line.startswith("| i2i | market1501"))
    assert row.replace("\\|", "").count("|") == 7 and len(row) < 900
    assert escape("a|b*c_d`e[f]<g>&") == "a\\|b\\*c\\_d\\`e\\[f\\]&lt;g&gt;&amp;"


def test_what_the_first_weights_were_trained_on_is_told(run: Path, tmp_path: Path) -> None:
    later = make_run(tmp_path / "later", **{"model.weights": str(run / "i2i" / "export")})
    shutil.copytree(run.parent / "shards", tmp_path / "shards")
    card, problems = card_of(later)
    assert "| first, i2i | market1501 (Market-1501) |" in card and "| first, pretrain | generic |" in card
    assert "the weights export, whose training data have terms of their own" in card
    assert card.index("first, pretrain") < card.index("first, i2i") < card.index("| pretrain | generic")
    assert len(problems) == 2


@pytest.mark.parametrize("damage", ["config.yaml", "i2i/metrics.json", "no stage"])
def test_what_cannot_be_read_is_said(damage: str, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    if damage == "no stage":
        (copy / "i2i").rename(copy / "other")
        card, problems = card_of(copy / "other")
        assert "knows no stage other" in problems[0] and "Not known: the weights" in card
        return
    (copy / damage).write_text("damaged: [")
    card, problems = card_of(copy / "i2i")
    assert any(damage in problem for problem in problems)
    assert ("Not known: the weights were exported from a folder without" in card) == (damage == "config.yaml")


def test_a_second_export_keeps_what_the_first_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([str(run), "--format", "safetensors", "--out", str(first)]) == 0
    assert "note: " in capsys.readouterr().out
    assert main([str(first), "--format", "torch", "--out", str(second)]) == 0
    assert "note: " not in capsys.readouterr().out
    cards = [(folder / "README.md").read_text() for folder in (first, second)]
    told = [card.partition("## Training data")[2] for card in cards]
    assert told[0] == told[1] and "academic research only" in told[1]
    assert "torch.load" in cards[1] and "torch.load" not in cards[0]
    (first / "README.md").write_text("## Training data\n\nnone at all\n")
    assert earlier_card(first) == ""  # no longer as it was written
