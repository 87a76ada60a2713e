"""A recipe's life: stages in order, hand-over, resuming between stages, the same numbers on one and two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reid_dist.config import RunConfig
from reid_dist.errors import UserError
from reid_dist.inputs import open_inputs
from reid_dist.recipe import run
from reid_dist.recipe_file import load_config
from reid_dist.stage_training import Resume
from shards.write import write

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ROOT = Path(__file__).parents[1]
STEPS = 3


@pytest.fixture(scope="module", name="recipe")
def short_recipe(tiny_recipe) -> Callable[..., RunConfig]:
    """The tiny recipe with few steps in every stage; by index throughout, so that rank counts can be compared."""
    by_index = "stages.pretrain.data.reader=index"
    return lambda output_dir, *overrides: tiny_recipe(output_dir, f"max_steps={STEPS}", by_index, *overrides)


def scores(output_dir: Path, stage: str) -> dict:
    return json.loads((output_dir / stage / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory: pytest.TempPathFactory, run_ranks) -> Path:
    """A run of all stages on two ranks."""
    output_dir = tmp_path_factory.mktemp("run")
    run_ranks(2, run, recipe(output_dir))
    return output_dir


def test_every_stage_leaves_export_scores_and_curves(finished: Path) -> None:
    for stage in ("pretrain", "i2i", "t2i"):
        manifest = json.loads((finished / stage / "export" / "manifest.json").read_text())
        assert manifest["stage"] == stage
        assert manifest["steps"] == STEPS
        assert set(scores(finished, stage)["t2i"]["cuhk_pedes"]) >= {"R1", "R5", "R10", "mAP", "mINP"}
        assert set(scores(finished, stage)["i2i"]["market1501"]) >= {"R1", "R5", "R10", "mAP", "mINP"}
        assert len(json.loads((finished / stage / "training.json").read_text())) == STEPS
    assert list((finished / "tensorboard").glob("events.*"))
    assert scores(finished, "start")["t2i"]["cuhk_pedes"]["R1"] >= 0


def test_the_manifest_records_what_trained(finished: Path) -> None:
    manifest = json.loads((finished / "i2i" / "export" / "manifest.json").read_text())
    assert "encoder.visual.stem.weight" in manifest["trainable"]
    assert "encoder.text.token_embedding.weight" in manifest["frozen"]
    assert "pillow" in manifest["decoder"].lower() or "simplejpeg" in manifest["decoder"]


def test_text_tower_passes_through_the_i2i_stage_untouched(finished: Path) -> None:
    before = load_file(finished / "pretrain" / "export" / "model.safetensors")
    after = load_file(finished / "i2i" / "export" / "model.safetensors")
    assert torch.equal(before["text.token_embedding.weight"], after["text.token_embedding.weight"])
    assert not torch.equal(before["visual.stem.weight"], after["visual.stem.weight"])
    assert not any("head" in name for name in after)


def test_the_resolved_config_can_be_passed_back(finished: Path, recipe) -> None:
    assert load_config(finished / "config.yaml") == recipe(finished)


def test_a_finished_run_trains_nothing_again(finished: Path, recipe, run_ranks) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.glob("*/export/model.safetensors")}
    run_ranks(1, run, recipe(finished))
    assert {file: file.stat().st_mtime_ns for file in finished.glob("*/export/model.safetensors")} == before


def test_an_interrupted_run_continues_with_the_stage_it_was_in(finished, recipe, run_ranks, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    expected = load_file(finished / "t2i" / "export" / "model.safetensors")
    # Killed while the last stage trained: neither its export nor its scores are there, but a half-written export is.
    (copy / "t2i" / "metrics.json").unlink()
    (copy / "t2i" / "export").rename(copy / "t2i" / "export.partial")
    kept = (copy / "i2i" / "export" / "model.safetensors").stat().st_mtime_ns
    run_ranks(2, run, recipe(copy))
    found = load_file(copy / "t2i" / "export" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert scores(copy, "t2i")["t2i"] == scores(finished, "t2i")["t2i"]
    assert (copy / "i2i" / "export" / "model.safetensors").stat().st_mtime_ns == kept
    assert not (copy / "t2i" / "export.partial").exists()


def test_other_settings_in_the_same_folder_are_refused(finished: Path, recipe, run_ranks) -> None:
    with pytest.raises(AssertionError, match="made from other settings"):
        run_ranks(1, run, recipe(finished, "optimizer.lr=5e-4"))


def resume_from_nowhere(config: RunConfig, nowhere: str) -> str:
    try:
        run(config, Resume(nowhere))
    except UserError as error:
        return str(error)
    return "it ran"


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_scored(recipe, run_ranks, tmp_path: Path) -> None:
    config, nowhere = recipe(tmp_path / "run"), str(tmp_path / "nowhere")
    (said,) = run_ranks(1, resume_from_nowhere, config, nowhere)
    assert said == f"{nowhere}: no checkpoint there; leave out --resume to begin anew"
    assert not list((tmp_path / "run").glob("*/*"))


def test_a_later_stage_of_other_settings_is_refused_when_an_earlier_folder_was_removed(
    finished: Path, recipe, tmp_path: Path
) -> None:
    """What was trained from the removed weights must not be taken for what the new ones would give."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "i2i")
    config = recipe(copy, "stages.i2i.optimizer.lr=5e-4")
    with pytest.raises(UserError, match=r"t2i: made from other settings"):
        run(config)


def test_a_benchmark_added_later_is_scored_without_training(finished, recipe, run_ranks, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for stage in ("start", "pretrain", "i2i", "t2i"):
        record = scores(copy, stage)
        record["i2i"] = {}
        (copy / stage / "metrics.json").write_text(json.dumps(record))
    before = {file: file.stat().st_mtime_ns for file in copy.glob("*/export/model.safetensors")}
    run_ranks(2, run, recipe(copy))
    assert {file: file.stat().st_mtime_ns for file in copy.glob("*/export/model.safetensors")} == before
    for stage in ("start", "pretrain", "i2i", "t2i"):
        assert scores(copy, stage)["i2i"] == scores(finished, stage)["i2i"]


def test_damaged_export_is_refused(finished: Path, recipe, run_ranks, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    file = copy / "i2i" / "export" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError, match="does not match its hash"):
        run_ranks(1, run, recipe(copy))


@pytest.mark.parametrize("ranks, accumulation", [(1, 1), (2, 2)])
def test_rank_count_changes_no_loss(finished, recipe, run_ranks, tmp_path, ranks: int, accumulation: int) -> None:
    """One rank has the losses of two; with accumulation micro-batches have fewer negatives, so other losses."""
    config = recipe(tmp_path / "run", f"engine.gradient_accumulation_steps={accumulation}")
    run_ranks(ranks, run, config)
    for stage in ("pretrain", "i2i", "t2i"):
        ours = [point["loss"] for point in json.loads((tmp_path / "run" / stage / "training.json").read_text())]
        theirs = [point["loss"] for point in json.loads((finished / stage / "training.json").read_text())]
        if accumulation == 1:
            assert ours == pytest.approx(theirs, rel=1e-4), stage
        else:  # fewer negatives in each micro-batch: other losses, but a run of its own right
            assert all(loss == pytest.approx(other, rel=0.6) for loss, other in zip(ours, theirs, strict=True))


def test_accumulation_with_cached_gradients_changes_no_loss(finished, recipe, run_ranks, tmp_path: Path) -> None:
    """All negatives of the step: every stage has the losses of a run that needs no accumulation."""
    cached = ("engine.gradient_accumulation_steps=2", "engine.cached_gradients=true")
    run_ranks(1, run, recipe(tmp_path / "run", *cached))
    for stage in ("pretrain", "i2i", "t2i"):
        ours = [point["loss"] for point in json.loads((tmp_path / "run" / stage / "training.json").read_text())]
        theirs = [point["loss"] for point in json.loads((finished / stage / "training.json").read_text())]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), stage


def test_captions_learn_from_the_mean_images_of_identities_on_any_number_of_ranks(recipe, run_ranks, tmp_path) -> None:
    loss = "{contrastive_weight: 0, identity_weight: 1, classifier: prototypes}"
    changes = ["stages.pretrain.steps=0", "stages.i2i.steps=0", "stages.t2i.freeze=[visual]", f"stages.t2i.loss={loss}"]
    curves = []
    for ranks, zero in ((1, 0), (2, 3)):
        folder = tmp_path / str(ranks)
        run_ranks(ranks, run, recipe(folder, *changes, f"stages.t2i.engine.zero_stage={zero}"))
        curves.append([point["loss"] for point in json.loads((folder / "t2i" / "training.json").read_text())])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][-1] < curves[0][0]


def test_a_stage_of_no_steps_hands_the_weights_on(recipe, run_ranks, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "stages.pretrain.steps=0", "stages.i2i.steps=0", "stages.t2i.steps=0")
    run_ranks(1, run, config)
    first = load_file(tmp_path / "run" / "pretrain" / "export" / "model.safetensors")
    last = load_file(tmp_path / "run" / "t2i" / "export" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert scores(tmp_path / "run", "start")["i2i"] == scores(tmp_path / "run", "t2i")["i2i"]


def test_frozen_vision_leaves_i2i_results_bit_identical(recipe, run_ranks, tmp_path: Path) -> None:
    run_ranks(2, run, recipe(tmp_path / "run", "stages.t2i.freeze=[visual]"))
    assert scores(tmp_path / "run", "t2i")["i2i"] == scores(tmp_path / "run", "i2i")["i2i"]
    assert scores(tmp_path / "run", "t2i")["t2i"] != scores(tmp_path / "run", "i2i")["t2i"]


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.root=/nowhere", "no such shard folder"),
        ("data.global_batch_size=18", "data.global_batch_size: 18 cannot be shared"),
        ("model.vocabulary=/nowhere.txt", "vocabulary"),
        ("model.architecture=ViT-B-17", "nearest: ViT-B-1"),
        ("model={architecture: RN50, image_size: [64, 64], gradient_checkpointing: true}", "gradient_checkpointing"),
        ("model={architecture: RN50, image_size: [64, 80]}", "model.image_size: 64x80"),
    ],
)
def test_wrong_input_is_found_before_any_process_group(recipe, tmp_path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_inputs(recipe(tmp_path, override), world_size=4)


VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def test_an_open_clip_vit_goes_the_whole_way(recipe, run_ranks, tmp_path: Path) -> None:
    """What the real recipe uses and the quickstart does not: ViT, CLIP's tokenizer, bf16, ZeRO 2, loading processes."""
    architecture = tmp_path / "vit.json"
    architecture.write_text(json.dumps(VIT))
    config = recipe(
        tmp_path / "run",
        f"model.architecture={architecture}",
        "model.vocabulary=null",
        "model.image_size=[64,32]",
        "model.patch_stride=12",
        "model.gradient_checkpointing=true",
        "engine.precision=bf16",
        "engine.zero_stage=2",
        "engine.gradient_accumulation_steps=2",
        "data.workers=1",
        "data.cache=false",
        "stages.i2i.loss.text_weight=0.5",
        "stages.i2i.data.train=[cuhk_pedes]",
        "stages.t2i.freeze=[visual]",
        "max_steps=2",
    )
    run_ranks(2, run, config)
    assert scores(tmp_path / "run", "t2i")["i2i"] == scores(tmp_path / "run", "i2i")["i2i"]
    manifest = json.loads((tmp_path / "run" / "t2i" / "export" / "manifest.json").read_text())
    assert manifest["words"] is None
    assert "encoder.visual.conv1.weight" in manifest["frozen"]


def test_a_streamed_stage_refuses_too_few_tars(recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "stages.pretrain.data.reader=stream", "stages.pretrain.data.workers=8")
    with pytest.raises(UserError, match=r"generic.*tars.*16"):
        open_inputs(config, 2)


@pytest.mark.parametrize(("stage", "reader"), [("i2i", "index"), ("pretrain", "stream")])
def test_training_on_what_is_scored_is_refused(
    recipe, tiny_world: Path, tmp_path: Path, stage: str, reader: str
) -> None:
    """A training set that holds the queries of another set's test split under names of its own."""
    queries = sorted((tiny_world / "raw" / "market1501" / "query").iterdir())
    (tmp_path / "raw").mkdir()
    lines = [f"{number}.jpg,{number % 5},somebody\n" for number in range(len(queries))]
    (tmp_path / "raw" / "own.csv").write_text("path,pid,caption\n" + "".join(lines))
    for number, file in enumerate(queries):
        shutil.copy(file, tmp_path / "raw" / f"{number}.jpg")
    write("csv", tmp_path / "raw", tmp_path / "strangers", shard_bytes=20_000)
    changes = (f"stages.{stage}.data.train=[{tmp_path / 'strangers'}]", f"stages.{stage}.data.reader={reader}")
    found = (
        rf"stages.{stage}: .*strangers: {len(queries)} images.*val or test split of .*market1501.*allow_overlap=true"
    )
    with pytest.raises(UserError, match=found):
        open_inputs(recipe(tmp_path / "run", *changes), 1)
    open_inputs(recipe(tmp_path / "run", *changes, f"stages.{stage}.data.allow_overlap=true"), 1)
