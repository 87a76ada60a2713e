"""What `launch/slurm/evaluate.sbatch` hands to the ranks, with a stand-in for the evaluation itself."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "evaluate.sbatch"
EVALUATION = """
import json, os, sys
names = ("SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps({"arguments": sys.argv[1:], **{name: os.environ[name] for name in names}}))
sys.exit(2 if "wrong" in sys.argv else 0)
"""


def _job(slurm: Any, folder: Path, *words: str) -> tuple[str, str]:
    """Exit code and log of the job."""
    (folder / "launch").mkdir()
    (folder / "launch" / "evaluate.py").write_text(EVALUATION)
    environment = slurm.environment | {"PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"}
    own = type(slurm)(environment)
    job = own.submit("--nodes=2", "--ntasks-per-node=1", f"--output={folder}/log", str(SCRIPT), *words, cwd=folder)
    (fields,) = own.wait(job).values()
    return fields["ExitCode"], (folder / "log").read_text()


def test_each_task_is_a_rank_with_the_arguments_of_the_command(slurm: Any, tmp_path: Path) -> None:
    code, log = _job(slurm, tmp_path, "runs/a", "--benchmarks", "a set")
    assert code == "0:0", log
    ranks = sorted((json.loads(line) for line in log.splitlines()), key=lambda rank: rank["SLURM_PROCID"])
    assert [rank["SLURM_PROCID"] for rank in ranks] == ["0", "1"]
    assert all(rank["arguments"] == ["runs/a", "--benchmarks", "a set"] for rank in ranks)
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.1.1"} and len({r["MASTER_PORT"] for r in ranks}) == 1


def test_its_exit_code_is_the_job_s(slurm: Any, tmp_path: Path) -> None:
    code, log = _job(slurm, tmp_path, "wrong")
    assert code == "2:0", log


def test_without_a_run_it_says_how_to_call_it(slurm: Any, tmp_path: Path) -> None:
    code, log = _job(slurm, tmp_path, "--benchmarks", "cuhk_pedes")
    assert code == "2:0" and log.count("\n") == 1
    assert log.startswith("evaluate.sbatch: name a run: sbatch")
