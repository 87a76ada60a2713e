"""Golden 20-step loss curves of every stage of the quickstart recipe, and of t2i against a queue, on two ranks.

A change that means to change numbers regenerates them: `REGENERATE_GOLDEN=1 bash tests/run.sh tests/golden`, and says
why in its commit. The tolerance is for other processors and library versions; on one machine the curves repeat.
"""

import json
import os
from pathlib import Path

import pytest

from reid_dist.recipe import run

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

FOLDER = Path(__file__).parent
STAGES = ("pretrain", "i2i", "t2i")
CURVES = (*STAGES, "t2i_queue")
# Of its own, so that the curve does not hang on what the quickstart makes of its queue; wrapped after 9 steps.
QUEUE = "{positives: identity, queue_size: 136, momentum: 0.9, in_batch_negatives: true}"
STEPS = 20
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def curves(tiny_recipe, tmp_path_factory: pytest.TempPathFactory, run_ranks) -> dict[str, list[float]]:
    output_dir = tmp_path_factory.mktemp("golden")
    short = (f"max_steps={STEPS}", "optimizer.warmup_steps=2", "evaluation={}")
    run_ranks(2, run, tiny_recipe(output_dir / "all", *short, "stages.t2i.loss={}"))
    # From random weights: the stages before it would only cost time.
    alone = ("stages.pretrain.steps=0", "stages.i2i.steps=0", f"stages.t2i.loss={QUEUE}")
    run_ranks(2, run, tiny_recipe(output_dir / "queue", *short, *alone))
    files = {stage: output_dir / "all" / stage for stage in STAGES} | {"t2i_queue": output_dir / "queue" / "t2i"}
    return {
        name: [point["loss"] for point in json.loads((file / "training.json").read_text())]
        for name, file in files.items()
    }


@pytest.mark.parametrize("stage", CURVES)
def test_loss_curve_is_the_golden_one(stage: str, curves: dict[str, list[float]]) -> None:
    file = FOLDER / f"{stage}.txt"
    if os.environ.get("REGENERATE_GOLDEN"):
        file.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(curves[stage], start=1)))
    golden = [float(line.split()[1]) for line in file.read_text().splitlines()]
    assert len(golden) == STEPS
    assert curves[stage] == pytest.approx(golden, rel=TOLERANCE)


@pytest.mark.parametrize("stage", CURVES)
def test_loss_falls(stage: str, curves: dict[str, list[float]]) -> None:
    start = 9 if stage == "t2i_queue" else 0  # a loss grows with the queue until that is full
    assert sum(curves[stage][-5:]) < sum(curves[stage][start : start + 5])
