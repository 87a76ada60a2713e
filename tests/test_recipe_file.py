"""The file of a recipe and the overrides of a command line."""

from pathlib import Path

import pytest

from reid_dist.recipe_file import dump_config, load_config
from tests.recipe_text import changed, problems

# Overrides


def test_overrides_win_over_the_file_and_stages_over_the_top(recipe: Path) -> None:
    config = load_config(recipe, ["optimizer.lr=1e-3", "stages.second.optimizer.lr=2e-3", "data.root=/elsewhere"])
    assert [stage.optimizer.lr for stage in config.stages] == [1e-3, 3e-4, 2e-3]
    assert {str(stage.data.root) for stage in config.stages} == {"/elsewhere"}


def test_overrides_reach_keys_that_the_file_lacks_and_take_yaml_values(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "engine.zero_stage=3",
            "max_steps=5",
            "model.image_size=[384, 128]",
            "stages.i2i.freeze=[text]",
            "model.weights=a=b",
        ],
    )
    assert config.stages[0].engine.zero_stage == 3
    assert [config.stage_steps(stage) for stage in config.stages] == [5, 5, 5]
    assert config.model.image_size == (384, 128)
    assert config.stages[1].freeze == ["text"]
    assert config.model.weights == "a=b"


def test_max_steps_caps_and_never_raises(recipe: Path) -> None:
    config = load_config(recipe, ["max_steps=30"])
    assert [config.stage_steps(stage) for stage in config.stages] == [30, 30, 20]
    config = load_config(recipe)
    assert [config.stage_steps(stage) for stage in config.stages] == [100, 50, 20]


@pytest.mark.parametrize("override", ["max_steps", "=3", "--steps=3"])
def test_an_override_without_a_key_and_a_value_is_told(override: str, recipe: Path) -> None:
    assert override.split("=")[0] in problems(recipe, override)[0]


def test_an_override_below_a_value_is_told(recipe: Path) -> None:
    assert "root is not a section" in problems(recipe, "data.root.x=1")[0]
    assert "stages" in problems(recipe, "stages.i2i=3")[0]


def test_an_override_that_is_not_yaml_is_told(recipe: Path) -> None:
    assert "not valid YAML" in problems(recipe, "model.image_size=[1")[0]


def test_an_override_of_an_unknown_stage_offers_the_nearest(recipe: Path) -> None:
    (line,) = problems(recipe, "stages.secnd.steps=3")
    assert line.startswith("stages.secnd:") and line.endswith("did you mean second?")


# The file


def test_a_repeated_key_is_refused(recipe: Path) -> None:
    (line,) = problems(changed(recipe, "output_dir: runs/test\n", "output_dir: runs/test\noutput_dir: other\n"))
    assert "'output_dir' stands twice" in line and "line 3" in line
    (line,) = problems(changed(recipe, "  root: shards\n", "  root: shards\n  root: other\n"))
    assert "'root' stands twice" in line


@pytest.mark.parametrize(
    "text", ["", "- a\n", "3", "a: [", "a: !!python/object/apply:os.getcwd []", "? [a]\n: b\n", "a: \x00"]
)
def test_a_file_that_is_no_recipe_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    (line,) = problems(path)
    assert line.startswith(f"{path}: ")


@pytest.mark.parametrize("stages", ["", "[]", "3", "[pretrain]", "[[]]", "{pretrain: {steps: 3}}", "[{steps: 3}]"])
def test_stages_that_are_no_list_of_stages_are_told(stages: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(f"model: {{architecture: ViT-B-16}}\nstages: {stages}\n")
    lines = problems(path)
    assert len(lines) == 1 and lines[0].startswith(f"{path}: stages"), lines


def test_a_problem_of_the_whole_recipe_has_no_empty_key(recipe: Path) -> None:
    (line,) = problems(recipe, "stages.second.name=i2i")
    assert line.startswith(f"{recipe}: stages: two stages share a name")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert "cannot read" in problems(tmp_path / "absent.yaml")[0]
    assert "cannot read" in problems(tmp_path)[0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80abc")
    (line,) = problems(tmp_path / "binary.yaml")
    assert "binary.yaml" in line


def test_the_resolved_config_reads_back_unchanged(recipe: Path, tmp_path: Path) -> None:
    overrides = ["max_steps=7", "engine.deepspeed.a.b=1", "optimizer.betas=[0.8, 0.9]", "model.vocabulary=words.txt"]
    config = load_config(recipe, overrides)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config
    assert dump_config(load_config(dumped)) == dump_config(config)
