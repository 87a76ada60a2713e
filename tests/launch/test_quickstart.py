"""`launch/quickstart.sh`: wrong options, and the smoke run of the whole way with its results."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RUN = ROOT / "runs" / "quickstart-fast"
METRICS = {"R1", "R5", "R10", "mAP", "mINP"}


def quickstart(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/quickstart.sh", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fats"], "unknown option --fats; it takes --fast"),
        (["--seed", "x"], "--seed needs a number, not 'x'"),
        (["--ranks"], "--ranks needs a number"),
        (["--ranks", "0"], "--ranks needs at least 1"),
    ],
)
def test_wrong_options_give_one_line_and_exit_code_2(options: list[str], words: str) -> None:
    result = quickstart(*options)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def fast_run() -> subprocess.CompletedProcess[str]:
    result = quickstart("--fast", "--cpu")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


@pytest.mark.slow
def test_results_have_every_row(fast_run: subprocess.CompletedProcess[str]) -> None:
    results = json.loads((RUN / "results.json").read_text())
    assert {"commit", "seconds", "baselines", "stages"} <= set(results)
    assert {"install", "data", "train", "total"} <= set(results["seconds"])
    assert {"chance", "untrained", "histogram", "ridge", "oracle"} <= set(results["baselines"])
    assert [stage["name"] for stage in results["stages"]] == ["pretrain", "i2i", "t2i"]
    for stage in results["stages"]:
        assert set(stage["t2i"]) >= METRICS
        assert set(stage["i2i"]) >= METRICS
    assert 0 < results["baselines"]["chance"]["t2i"]["R1"] < results["baselines"]["oracle"]["t2i"]["R1"] <= 100


@pytest.mark.slow
def test_table_sheet_and_curves_are_there(fast_run: subprocess.CompletedProcess[str]) -> None:
    assert "chance" in fast_run.stdout
    assert "t2i" in fast_run.stdout
    assert Image.open(RUN / "contact_sheet.png").width > 500
    assert list((RUN / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_running_it_again_reuses_what_is_there(fast_run: subprocess.CompletedProcess[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in RUN.glob("*/export/model.safetensors")}
    began = time.monotonic()
    again = quickstart("--fast", "--cpu")
    assert again.returncode == 0
    assert time.monotonic() - began < 60
    assert {file: file.stat().st_mtime_ns for file in RUN.glob("*/export/model.safetensors")} == before
