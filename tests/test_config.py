"""Recipes as people write them: defaults, wrong keys and values, rules between keys."""

from pathlib import Path

import pytest
import yaml

from reid_dist.config import STAGE_CONFIGS, DataConfig, I2ILoss, PretrainLoss, RunConfig, T2IStageConfig, TextLoss
from reid_dist.recipe_file import load_config
from tests.recipe_text import changed, problems

# Defaults of stages


def test_top_level_sections_are_the_defaults_of_every_stage(recipe: Path) -> None:
    pretrain, i2i, t2i = load_config(recipe).stages
    assert [stage.data.global_batch_size for stage in (pretrain, i2i, t2i)] == [32, 32, 32]
    assert [stage.optimizer.lr for stage in (pretrain, i2i, t2i)] == [1e-5, 3e-4, 1e-5]
    assert i2i.optimizer.warmup_steps == 10
    assert t2i.evaluation.t2i == ["cuhk_pedes"]


def test_a_stage_overrides_single_keys_of_nested_sections(recipe: Path) -> None:
    pretrain, i2i, _ = load_config(recipe).stages
    assert (pretrain.data.augment.flip, pretrain.data.augment.erase) == (0.25, 0.0)
    assert (i2i.data.augment.flip, i2i.data.augment.erase) == (0.25, 0.5)


def test_a_stage_s_kind_is_its_name_unless_given(recipe: Path) -> None:
    config = load_config(recipe)
    assert [stage.kind for stage in config.stages] == ["pretrain", "i2i", "t2i"]
    assert isinstance(config.stages[2], T2IStageConfig) and config.stages[2].name == "second"


def test_losses_belong_to_the_kind(recipe: Path) -> None:
    loss = load_config(recipe).stages[1].loss  # type: ignore[union-attr]
    assert isinstance(loss, I2ILoss) and (loss.triplet_margin, loss.label_smoothing) == (0.5, 0.1)
    assert problems(recipe, "stages.second.loss.triplet_margin=1")[0].startswith(
        f"{recipe}: unknown key stages.second.loss.triplet_margin"
    )


def test_a_number_without_a_dot_is_still_a_number(recipe: Path) -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    assert yaml.safe_load("1e-5") == "1e-5"
    assert load_config(recipe).stages[0].optimizer.lr == 1e-5
    assert load_config(recipe, ["optimizer.lr=2e-4"]).stages[0].optimizer.lr == 2e-4


# Unknown names


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("output_dri=x", "output_dri", "output_dir"),
        ("optimizr.lr=1", "optimizr", "optimizer"),
        ("optimizer.warmup_step=1", "optimizer.warmup_step", "warmup_steps"),
        ("data.augment.flp=1", "data.augment.flp", "flip"),
        ("model.achitecture=x", "model.achitecture", "architecture"),
        ("stages.i2i.step=1", "stages.i2i.step", "steps"),
        ("stages.i2i.loss.triplet_magin=1", "stages.i2i.loss.triplet_magin", "triplet_margin"),
        ("stages.i2i.data.augment.erasse=1", "stages.i2i.data.augment.erasse", "erase"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_that_exists(
    override: str, key: str, nearest: str, recipe: Path
) -> None:
    assert problems(recipe, override) == [f"{recipe}: unknown key {key}; did you mean {nearest}?"]


def test_a_key_unlike_any_lists_those_that_exist(recipe: Path) -> None:
    (line,) = problems(recipe, "engine.qqqq=1")
    assert line.endswith(
        "known: backend, zero_stage, precision, gradient_accumulation_steps, cached_gradients, max_grad_norm, deepspeed"
    )


def test_an_unknown_stage_offers_the_nearest(recipe: Path) -> None:
    (line,) = problems(changed(recipe, "kind: t2i", "kind: t2ii"))
    assert "unknown stage 't2ii'; did you mean t2i?" in line


def test_raw_deepspeed_keys_are_free(recipe: Path) -> None:
    config = load_config(recipe, ["engine.deepspeed.zero_optimization.overlap_comm=true"])
    assert config.stages[0].engine.deepspeed == {"zero_optimization": {"overlap_comm": True}}


# Wrong values


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("data.augment.flip=1.5", "data.augment.flip"),
        ("model.image_size=384", "model.image_size"),
        ("model.image_size=[384]", "model.image_size"),
        ("model.image_size=[-384, 128]", "model.image_size"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("engine.zero_stage=4", "engine.zero_stage"),
        ("stages.i2i.steps=-1", "stages.i2i.steps"),
        ("stages.i2i.steps=1.5", "stages.i2i.steps"),
        ("stages.i2i.loss.label_smoothing=1", "stages.i2i.loss.label_smoothing"),
        ("max_steps=0", "max_steps"),
        ("engine=3", "engine"),
        ("engine=", "engine"),
        ("stages.i2i.data.train=market1501", "stages.i2i.data.train"),
        ("seed=", "seed"),
    ],
)
def test_a_wrong_value_is_told_once_with_file_and_key(override: str, key: str, recipe: Path) -> None:
    (line,) = problems(recipe, override)
    assert line.startswith(f"{recipe}: {key}"), line


@pytest.mark.parametrize("value", ["3", "", "[a]", "shards"])
def test_a_default_that_no_stage_takes_is_told_too(value: str, recipe: Path) -> None:
    """Every stage of the recipe has its own `data:`, so validation never sees the top level's."""
    own = [f"stages.{name}.data.global_batch_size=32" for name in ("pretrain", "i2i", "second")]
    (line,) = problems(recipe, f"data={value}", *own)
    assert line.startswith(f"{recipe}: data: ") and line.endswith(f"not {yaml.safe_load(value)!r}")


def test_a_wrong_default_is_told_beside_stages_that_are_no_list(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: {architecture: ViT-B-16}\ndata: 3\nstages: 3\n")
    lines = problems(path)
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in lines] == ["data", "stages"]


def test_a_misspelt_choice_offers_the_nearest(recipe: Path) -> None:
    (line,) = problems(recipe, "engine.precision=bf61")
    assert f"{recipe}: engine.precision:" in line and "did you mean bf16?" in line


def test_all_problems_are_told_at_once(recipe: Path) -> None:
    lines = problems(recipe, "optimizer.lr=-1", "stages.i2i.steps=-3", "model.image_size=7", "seed=-1")
    assert len(lines) == 4
    for key in ("optimizer.lr", "stages.i2i.steps", "model.image_size", "seed"):
        assert sum(f"{recipe}: {key}: " in line for line in lines) == 1


def test_unknown_keys_and_wrong_values_are_told_together(recipe: Path) -> None:
    lines = problems(recipe, "optimizer.lrr=1", "stages.i2i.step=1", "engine.zero_stage=9", "stages.second.kind=t2")
    assert len(lines) == 4, lines
    for part in ("optimizer.lrr", "stages.i2i.step;", "engine.zero_stage", "'t2'"):
        assert sum(part in line for line in lines) == 1


def test_a_missing_key_is_named(recipe: Path) -> None:
    (line,) = problems(changed(recipe, "model: {architecture: ViT-B-16, image_size: [256, 128]}", ""))
    assert line.startswith(f"{recipe}: model: ")
    (line,) = problems(changed(recipe, "    steps: 50\n", ""))
    assert line.startswith(f"{recipe}: stages.i2i.steps: ")


# Rules between keys


def test_stages_of_one_name_are_refused(recipe: Path) -> None:
    (line,) = problems(changed(recipe, "name: second", "name: i2i"))
    assert "two stages share a name" in line


def test_two_stages_of_one_kind_are_fine(recipe: Path) -> None:
    config = load_config(changed(recipe, "kind: t2i", "kind: pretrain"))
    assert [stage.kind for stage in config.stages] == ["pretrain", "i2i", "pretrain"]


@pytest.mark.parametrize("name", ["../up", "a b", "", "x" * 41, "a/b"])
def test_a_stage_s_name_must_do_as_a_folder_s(name: str, recipe: Path) -> None:
    lines = problems(changed(recipe, "name: second", f"name: {name!r}"))
    assert len(lines) == 1 and "name" in lines[0]


def test_a_stage_without_training_data_is_refused_unless_it_has_no_steps(recipe: Path) -> None:
    (line,) = problems(recipe, "stages.second.data.train=[]")
    assert line.startswith(f"{recipe}: stages.second: data.train is empty")
    assert load_config(recipe, ["stages.second.data.train=[]", "stages.second.steps=0"]).stages[2].steps == 0


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stages.i2i.freeze=[visual]", "i2i stage trains the vision encoder"),
        ("stages.second.freeze=[visual, text]", "nothing to train"),
        ("stages.second.freeze=[image]", "freeze"),
        ("stages.second.freeze=visual", "freeze"),
    ],
)
def test_impossible_freezes_are_refused(override: str, reason: str, recipe: Path) -> None:
    (line,) = problems(recipe, override)
    assert reason in line and str(recipe) in line


def test_an_i2i_stage_may_freeze_the_text_tower(recipe: Path) -> None:
    assert load_config(recipe, ["stages.i2i.freeze=[text]"]).stages[1].freeze == ["text"]


def test_pure_bf16_needs_a_zero_stage_with_fp32_masters(recipe: Path) -> None:
    lines = problems(recipe, "engine.precision=pure_bf16", "engine.zero_stage=0")
    assert lines and all("zero_stage 1, 2 and 3" in line for line in lines)
    for zero_stage in (1, 2, 3):
        load_config(recipe, ["engine.precision=pure_bf16", f"engine.zero_stage={zero_stage}"])
    load_config(recipe, ["engine.precision=bf16", "engine.zero_stage=0"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.second.loss.classifier=prototypes", "stages.second.freeze=[]"], "set freeze=[visual]"),
        (["stages.second.loss.classifier=prototypes", "stages.second.train_prompts=true"], "without train_prompts"),
        (["stages.i2i.loss.text_weight=1", "stages.i2i.loss.text.classifier=prototypes"], "need a frozen image tower"),
    ],
)
def test_prototypes_need_image_features_that_stay(overrides: list[str], words: str, recipe: Path) -> None:
    weights = [
        f"{override.split('classifier')[0]}identity_weight=1" for override in overrides if "classifier" in override
    ]
    (line,) = problems(recipe, *weights, *overrides)
    assert "classifier: prototypes" in line and words in line
    load_config(recipe, ["stages.second.loss.identity_weight=1", "stages.second.loss.classifier=prototypes"])


QUEUE = "stages.second.loss.queue_size=4096"


def test_a_queue_needs_only_its_size(recipe: Path) -> None:
    loss = load_config(recipe, [QUEUE]).stages[2].loss  # type: ignore[union-attr]
    assert isinstance(loss, TextLoss)
    assert (loss.queue_size, loss.momentum, loss.queue_init, loss.in_batch_negatives) == (4096, 0.999, "empty", False)
    assert (loss.queue_mask, loss.key_head, loss.queue_sharded, loss.temperature) == (
        "identity",
        "momentum",
        False,
        None,
    )
    pretrain = load_config(recipe, ["stages.pretrain.loss.queue_size=8"]).stages[0].loss  # type: ignore[union-attr]
    assert isinstance(pretrain, PretrainLoss) and pretrain.queue_size == 8


@pytest.mark.parametrize(
    "override",
    [
        "in_batch_negatives=true",
        "queue_mask=batch",
        "queue_init=random_as_published",
        "queue_sharded=true",
        "queue_check_every=5",
    ],
)
@pytest.mark.parametrize("stage", ["second", "pretrain"])
def test_settings_of_a_queue_without_one_are_refused_in_one_line(override: str, stage: str, recipe: Path) -> None:
    (line,) = problems(recipe, f"stages.{stage}.loss.{override}")
    assert line.startswith(f"{recipe}: stages.{stage}.loss: {override.split('=')[0]}: without a queue")
    load_config(recipe, [f"stages.{stage}.loss.{override}", f"stages.{stage}.loss.queue_size=64"])


def test_all_idle_settings_stand_in_the_line(recipe: Path) -> None:
    overrides = [f"stages.second.loss.{text}" for text in ("in_batch_negatives=true", "queue_sharded=true")]
    (line,) = problems(recipe, *overrides)
    assert "queue_sharded, in_batch_negatives: without a queue (queue_size: 0)" in line


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("queue_size=-1", "queue_size"),
        ("queue_size=3000000000", "queue_size"),
        ("momentum=1", "momentum"),
        ("momentum=-0.1", "momentum"),
        ("temperature=0", "temperature"),
        ("queue_init=random", "queue_init"),
        ("queue_mask=union", "queue_mask"),
        ("key_head=shared", "key_head"),
        ("queue_check_every=-1", "queue_check_every"),
    ],
)
def test_a_wrong_value_of_the_queue_is_told(override: str, key: str, recipe: Path) -> None:
    (line,) = problems(recipe, QUEUE, f"stages.second.loss.{override}")
    assert line.startswith(f"{recipe}: stages.second.loss.{key}: ")


def test_a_mask_of_the_whole_step_and_negatives_of_the_step_exclude_each_other(recipe: Path) -> None:
    extra = [f"stages.second.loss.{text}" for text in ("queue_mask=batch", "in_batch_negatives=true")]
    (line,) = problems(recipe, QUEUE, *extra)
    assert "queue_mask: batch leaves out all keys of the step" in line


def test_momentum_encoders_under_zero_3_are_refused(recipe: Path) -> None:
    (line,) = problems(recipe, QUEUE, "stages.second.engine.zero_stage=3")
    assert line.startswith(f"{recipe}: stages.second: engine.zero_stage: 3 is not proven") and "0, 1 or 2" in line
    load_config(recipe, [QUEUE, "stages.second.engine.zero_stage=2", "stages.pretrain.engine.zero_stage=3"])


def test_cached_gradients_need_accumulation_and_whole_weights(recipe: Path) -> None:
    alone = problems(recipe, "stages.i2i.engine.cached_gradients=true")
    assert len(alone) == 1 and "gradient_accumulation_steps is 1" in alone[0]
    both = ["stages.i2i.engine.cached_gradients=true", "stages.i2i.engine.gradient_accumulation_steps=4"]
    (line,) = problems(recipe, *both, "stages.i2i.engine.zero_stage=3")
    assert "cached_gradients: needs whole weights" in line
    assert load_config(recipe, both).stages[1].engine.cached_gradients


# The object


def test_a_config_cannot_be_changed(recipe: Path) -> None:
    config: RunConfig = load_config(recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("root", "name", "location"),
    [
        ("data/shards/", "market1501", "data/shards/market1501"),
        ("data", "/elsewhere/set", "/elsewhere/set"),
        ("s3://bucket/sets", "https://host/set", "https://host/set"),
        ("s3://bucket/sets/", "market1501", "s3://bucket/sets/market1501"),
        ("https://host:8080/a?token=x/y", "cc3m/{0..9}.tar", "https://host:8080/a/cc3m/{0..9}.tar?token=x/y"),
    ],
)
def test_where_a_set_is(root: str, name: str, location: str) -> None:
    assert DataConfig(root=root).location(name) == location


IN_TURNS = {"train": ["a", "b"], "mixing": "alternating"}


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("t2i", {"freeze": ["visual"], "train_prompts": True, "loss": {"queue_size": 8}}, "train_prompts: a frozen"),
        ("pretrain", {"freeze": ["visual"], "patch_dropout": 0.5}, "patch_dropout: a frozen image tower"),
        ("t2i", {"loss": {"contrastive_weight": 0, "sdm_weight": 1, "positives": "pair"}}, "positives: of the contr"),
        (
            "i2i",
            {"data": IN_TURNS, "loss": {"text_weight": 1, "conflict_every": 5}},
            "conflict_every: needs both tasks",
        ),
    ],
)
def test_settings_that_would_be_idle_are_refused(kind: str, settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        STAGE_CONFIGS[kind].model_validate({"name": kind, "kind": kind, "steps": 0, **settings})
