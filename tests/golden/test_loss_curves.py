"""Golden 20-step loss curves of every stage of the quickstart recipe, on two ranks.

A change that means to change numbers regenerates them: `REGENERATE_GOLDEN=1 bash tests/run.sh tests/golden`, and says
why in its commit. The tolerance is for other processors and library versions; on one machine the curves repeat.
"""

import json
import os
from pathlib import Path

import pytest

from reid_dist.recipe import run

FOLDER = Path(__file__).parent
STAGES = ("pretrain", "i2i", "t2i")
STEPS = 20
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def curves(tiny_recipe, tmp_path_factory: pytest.TempPathFactory, run_ranks) -> dict[str, list[float]]:
    output_dir = tmp_path_factory.mktemp("golden")
    run_ranks(2, run, tiny_recipe(output_dir, f"max_steps={STEPS}", "optimizer.warmup_steps=2"))
    return {
        stage: [point["loss"] for point in json.loads((output_dir / stage / "training.json").read_text())]
        for stage in STAGES
    }


@pytest.mark.parametrize("stage", STAGES)
def test_loss_curve_is_the_golden_one(stage: str, curves: dict[str, list[float]]) -> None:
    file = FOLDER / f"{stage}.txt"
    if os.environ.get("REGENERATE_GOLDEN"):
        file.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(curves[stage], start=1)))
    golden = [float(line.split()[1]) for line in file.read_text().splitlines()]
    assert len(golden) == STEPS
    assert curves[stage] == pytest.approx(golden, rel=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_loss_falls(stage: str, curves: dict[str, list[float]]) -> None:
    assert sum(curves[stage][-5:]) < sum(curves[stage][:5])
