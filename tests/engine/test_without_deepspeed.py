"""Plans and trains in an interpreter whose packages are all of this one's but DeepSpeed."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from reid_dist.config import EngineConfig
from reid_dist.engine import require_backend
from reid_dist.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = """
import importlib.util, json, sys
assert importlib.util.find_spec("deepspeed") is None
from launch.train import main
print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder like site-packages, without DeepSpeed."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("deepspeed") and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def test_a_recipe_is_planned_and_trained(packages: Path, tiny_world: Path, tmp_path: Path) -> None:
    recipe = [
        str(ROOT / "configs" / "quickstart.yaml"),
        f"data.root={tiny_world}",
        f"model.vocabulary={tiny_world / 'vocabulary.txt'}",
        f"model.architecture={ROOT / 'configs' / 'models' / 'row_conv_tiny.json'}",
        "data.global_batch_size=8",
        "stages.pretrain.steps=0",
        "stages.i2i.steps=0",
        "max_steps=2",
        "evaluation.t2i=[]",
        "evaluation.i2i=[]",
    ]
    commands = [
        [*recipe, "--dry-run"],
        [*recipe, f"output_dir={tmp_path / 'refused'}"],
        [*recipe, f"output_dir={tmp_path / 'run'}", "engine.backend=torch", "engine.zero_stage=0"],
    ]
    found = subprocess.run(
        [sys.executable, "-S", "-c", RUN, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": f"{packages}:{ROOT}", "LOCAL_WORLD_SIZE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == [0, 2, 0], found.stderr
    [line] = [line for line in found.stderr.splitlines() if "engine.backend" in line]
    assert "the package deepspeed, which is not installed" in line and "set engine.backend=torch" in line
    assert "Traceback" not in found.stderr
    assert (tmp_path / "run" / "t2i" / "export" / "model.safetensors").is_file()


def test_the_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr("reid_dist.engine.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="torch needs the package accelerate, which is not installed; pip install accelerate"
    ):
        require_backend(EngineConfig(backend="torch"))
