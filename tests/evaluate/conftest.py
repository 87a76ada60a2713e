"""A tiny world with val and test splits, and runs whose weights are random but whose files are those of real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist.checkpoint.portable import save_export
from reid_dist.config import RunConfig
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import count_words, read_vocabulary, write_vocabulary
from reid_dist.inputs import build_encoder
from reid_dist.recipe_file import dump_config, load_config
from shards.world.export import export
from shards.world.spec import LEVELS, ExportSpec, World
from shards.write import write
from tests.toy_shards import write_set as write_toy_set

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard sets cuhk_pedes (train, val, test), market1501 (train, test), and vocabulary.txt."""
    root = tmp_path_factory.mktemp("evaluated_world")
    level = LEVELS["quickstart"]
    drawn = World(3, level["hardness"], int(level["siblings"]), level["coverage"], level["wrong"])
    for name in ("cuhk_pedes", "market1501"):
        export(ExportSpec(name, drawn, 4, 6, 4, 4, 0.4), root / "raw" / name, 1)
        write(name, root / "raw" / name, root / name)
    write_vocabulary(count_words([ShardSet(root / "cuhk_pedes")]), root / "vocabulary.txt")
    return root


def write_run(world: Path, folder: Path, *overrides: str) -> Path:
    """A run of the quickstart recipe whose stages i2i and t2i are there, with random weights."""
    architecture = ROOT / "configs" / "models" / "row_conv_tiny.json"
    settings = [f"data.root={world}", f"model.vocabulary={world / 'vocabulary.txt'}"]
    settings += [f"output_dir={folder}", f"model.architecture={architecture}"]
    config: RunConfig = load_config(ROOT / "configs" / "quickstart.yaml", [*settings, *overrides])
    for number, stage in enumerate(("i2i", "t2i")):
        encoder = build_encoder(config.model, config.seed + 10 * number)
        for parameter in encoder.parameters():  # towers with zeros at the start would answer all alike
            parameter.data += 0.1 * torch.randn_like(parameter)
        state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        words = read_vocabulary(world / "vocabulary.txt")
        save_export(folder / stage / "export", state, config.model, words, {"stage": stage, "steps": 1})
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture(scope="session")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, for tests that only read it."""
    return write_run(world, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture
def new_run(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """`new_run(name, *overrides)`: a run of the test's own."""
    return lambda name, *overrides: write_run(world, tmp_path / name, *overrides)


@pytest.fixture
def write_set() -> Callable[..., Path]:
    return write_toy_set
