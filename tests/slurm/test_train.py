"""`launch/slurm/train.sbatch` with a real training: its weights are those of a run that nothing stopped."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.config import RunConfig
from reid_dist.files import write_text
from reid_dist.recipe import run
from reid_dist.recipe_file import dump_config
from tests.slurm.conftest import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("deepspeed_imported")]

ROOT = Path(__file__).parents[2]
STEPS = 30
SETTINGS = (
    "stages.pretrain.steps=0",
    "stages.i2i.steps=0",
    f"max_steps={STEPS}",
    "evaluation={}",
    "checkpoint.every=0",
    "ledger=true",
)


@pytest.fixture(scope="module")
def reference(
    tiny_recipe: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable
) -> Path:
    """The run that nothing stops, of two ranks without SLURM."""
    config = tiny_recipe(tmp_path_factory.mktemp("reference") / "run", *SETTINGS)
    run_ranks(2, run, config)
    return config.output_dir


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "t2i" / "export" / "model.safetensors").read_bytes()).hexdigest()


def _steps(folder: Path) -> list[list[Any]]:
    """Of each rank: step, loss to the last bit and samples, as often as it was trained."""
    files = sorted((folder / "t2i" / "ledger").glob("*.jsonl"))
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[entry for entry in of_rank if "step" in entry] for of_rank in lines]


class Job:
    """A run of the recipe under SLURM: two ranks on two nodes."""

    def __init__(self, slurm: Any, config: RunConfig, folder: Path) -> None:
        self.slurm, self.config = slurm, config
        self._log = folder / "log"
        recipe = folder / "recipe.yaml"
        write_text(recipe, dump_config(config))
        options = ("--nodes=2", "--ntasks-per-node=1", f"--output={self._log}")
        self.number = slurm.submit(*options, "launch/slurm/train.sbatch", str(recipe), cwd=ROOT)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.log() or self._has_ended(), f"{text!r}", 120)
        assert text in self.log(), self.log()

    def _has_ended(self) -> bool:
        return not self.slurm.run("squeue", "--noheader", "--jobs", self.number)

    def ends(self) -> None:
        (fields,) = self.slurm.wait(self.number, 180).values()
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), self.log()


@pytest.fixture
def job(slurm: Any, tiny_recipe: Callable[..., RunConfig], tmp_path: Path) -> Job:
    return Job(slurm, tiny_recipe(tmp_path / "run", *SETTINGS), tmp_path)


def test_stopped_by_usr1_it_is_requeued_and_ends_as_if_never_stopped(job: Job, reference: Path) -> None:
    job.wait_for(f"t2i 5/{STEPS}:")
    job.slurm.run("scancel", "--signal=USR1", job.number)
    job.ends()
    assert "train.py: SIGUSR1: saved after step " in job.log(), job.log()
    _check_same(job.config.output_dir, reference)


@pytest.mark.long
def test_preempted_it_ends_as_if_never_stopped(job: Job, reference: Path, tmp_path: Path) -> None:
    job.wait_for(f"t2i 5/{STEPS}:")
    urgent = job.slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=:", cwd=tmp_path)
    job.slurm.wait(urgent)
    job.ends()
    assert "train.py: SIGTERM: saved after step " in job.log(), job.log()
    _check_same(job.config.output_dir, reference)


def _check_same(folder: Path, reference: Path) -> None:
    assert _steps(folder) == _steps(reference)
    assert len(_steps(folder)) == 2 and len(_steps(folder)[0]) == STEPS
    assert _weights(folder) == _weights(reference)
