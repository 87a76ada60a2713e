"""Every recipe and every architecture that is shipped."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from reid_dist.config import ModelConfig
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.recipe_file import dump_config, load_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
ARCHITECTURES = sorted((ROOT / "configs" / "models").rglob("*.json"))
LAUNCHERS = {"deepspeed", "torchrun", "python", "bash", "sbatch", "srun"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the commands of the recipes are typed, and what their paths are relative to."""
    monkeypatch.chdir(ROOT)


def test_there_are_recipes_and_architectures() -> None:
    assert "configs/quickstart.yaml" in map(relative, RECIPES)
    assert "configs/models/row_conv_tiny.json" in map(relative, ARCHITECTURES)
    assert list((ROOT / "configs").rglob("*.yml")) == [], "recipes end in .yaml"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_loads_and_reads_back_unchanged(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_s_first_line_is_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), first
    command = shlex.split(first.removeprefix("# "))
    assert command[0] in LAUNCHERS and relative(path) in command, first
    scripts = [word for word in command if re.fullmatch(r"\S+\.(py|sh|sbatch)", word)]
    assert scripts and all((ROOT / script).is_file() for script in scripts), first
    overrides = [word for word in command[command.index(relative(path)) + 1 :] if not word.startswith("-")]
    load_config(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_is_complete_in_itself(path: Path) -> None:
    """Flat files: nothing is included or inherited, and what a path of the repository names is there."""
    config = load_config(path)
    if config.model.architecture.endswith(".json"):
        assert Path(config.model.architecture).is_file()
    with torch.device("meta"):
        build_dual_encoder(config.model)


@pytest.mark.parametrize("path", ARCHITECTURES, ids=relative)
@pytest.mark.parametrize("size", [(64, 32), (256, 128)])
def test_an_architecture_builds_and_runs_without_a_device(path: Path, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        encoder = build_dual_encoder(ModelConfig(architecture=str(path), image_size=size))
        image = torch.zeros(2, 3, *size, dtype=torch.uint8)
        token = torch.zeros(2, encoder.text_shape.context_length, dtype=torch.int64)
        output = encoder(image, token)
    assert output.image_features.shape == output.text_features.shape == (2, encoder.features)
