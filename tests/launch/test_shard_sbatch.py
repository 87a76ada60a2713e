"""The SLURM script, run by bash with the variables of an array, and by a real SLURM where there is one."""

import io
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from reid_dist.data.reader import ShardSet

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launch/slurm/shard.sbatch"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of img2dataset with 12 pairs."""
    folder = tmp_path / "raw with space"
    folder.mkdir()
    for number in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 30 + number), (number, 0, 0)).save(buffer, "JPEG")
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{number}.txt").write_text(f"scene {number}")
    return folder


def _task(raw: Path, out: Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / SCRIPT), "img2dataset", "--root", str(raw), "--out", str(out), "--shard-mb", "0.008"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(command, env={**clean, **variables}, cwd=cwd, capture_output=True, text=True, timeout=120)


def _array(number: int, first: int, count: int) -> dict[str, str]:
    values = {"ID": number, "MIN": first, "MAX": first + count - 1, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize("first", [0, 1])
def test_array_tasks_make_a_set(first: int, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (first + 2, first, first + 1):
        assert not (out / "manifest.json").exists()
        result = _task(raw, out, **_array(number, first, 3), SLURM_CPUS_PER_TASK="2")
        assert result.returncode == 0, result.stderr
    assert len(ShardSet(out)) == 12 and len(ShardSet(out).manifest.shards) > 3


def test_one_job_without_array(raw: Path, tmp_path: Path) -> None:
    result = _task(raw, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(ShardSet(tmp_path / "out")) == 12


def test_paths_stay_relative_to_the_submit_folder(raw: Path, tmp_path: Path) -> None:
    below = ROOT / "launch"
    relative = os.path.relpath(raw, below)
    result = _task(Path(relative), tmp_path / "out", cwd=below, SLURM_SUBMIT_DIR=str(below))
    assert result.returncode == 0, result.stderr


def test_refusals(raw: Path, tmp_path: Path) -> None:
    gaps = {**_array(2, 1, 3), "SLURM_ARRAY_TASK_MAX": "5"}
    result = _task(raw, tmp_path / "out", **gaps)
    assert result.returncode == 2 and "numbers without gaps, such as 1-3" in result.stderr
    result = _task(raw, tmp_path / "out", cwd=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 2 and "submit it from the folder of the repository" in result.stderr
    result = subprocess.run(["bash", SCRIPT, "--root", "x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "name a data set" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
