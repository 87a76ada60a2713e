"""Every recipe of a method, in small: all its stages on two ranks under every ZeRO stage, on the procedural world.

And once with backend torch, which tests/engine holds against DeepSpeed stage by stage.
"""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from reid_dist.config import RunConfig
from reid_dist.inputs import build_encoder
from reid_dist.models.weights import EXPORT_FILE
from reid_dist.recipe import run
from reid_dist.recipe_file import load_config

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ROOT = Path(__file__).parents[1]
OWN_TESTS = ("quickstart", "claims")
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith(OWN_TESTS))
UNSCORED = (1, 2)  # a score is the export's, and exports are compared: scored without ZeRO, and with all of it
STEPS = 2
# CLIP's ResNet and ViT, and TextReID's dictionary, with next to no weights.
RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "text_cfg": {"context_length": 40, "vocab_size": 512, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def small(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory):
    """`small(name, zero_stage, backend)`: a shipped recipe with everything but its size as it is."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "resnet.json").write_text(json.dumps(RESNET))

    def make(name: str, zero_stage: int, backend: str = "deepspeed") -> RunConfig:
        recipe = ROOT / "configs" / f"{name}.yaml"
        convolutional = name.startswith("textreid")
        architecture = folder / "resnet.json" if convolutional else ROOT / "configs" / "models" / "vit_tiny.json"
        changes = [
            f"output_dir={folder / name / backend / str(zero_stage)}",
            f"model.architecture={architecture}",
            f"model.vocabulary={tiny_world / 'vocabulary.txt'}",
            f"data.root={tiny_world}",
            "model.weights=null",
            "model.image_size=[64, 32]",
            "model.patch_stride=null",
            "data.exclude=null",
            "data.workers=0",
            "evaluation.split=test",
            "data.global_batch_size=16",
            f"max_steps={STEPS}",
            "log_every=1",
            "engine.precision=fp32",
            f"engine.zero_stage={zero_stage}",
            f"engine.backend={backend}",
        ]
        if convolutional:
            changes += [f"model.word_gru.{width}=16" for width in ("features", "hidden")]
            changes += ["model.word_gru.dictionary=null", "model.projection=12"]
        if name.startswith("prompt"):
            changes += ["model.prompts.visual_depth=4", "model.prompts.text_depth=2"]
        if not is_scored(zero_stage, backend):
            changes += ["evaluation.t2i=[]", "evaluation.i2i=[]"]
        if zero_stage == 3 and "joint" in (stage.name for stage in load_config(recipe).stages):
            changes += ["stages.joint.loss.conflict_every=0"]  # which needs whole gradients
        if name.startswith("pretrain"):
            changes += ["data.train=[generic]", "data.weights=[]"]
        sections = [f"stages.{stage.name}.data.global_batch_size=16" for stage in load_config(recipe).stages]
        return load_config(recipe, [*changes, *sections])

    return make


def is_scored(zero_stage: int, backend: str) -> bool:
    return zero_stage not in UNSCORED and backend == "deepspeed"


def allowed(config: RunConfig) -> bool:
    """Momentum encoders are not for ZeRO 3; such recipes say so."""
    return not any(getattr(stage.loss, "queue_size", 0) for stage in config.stages)


def length(weights: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in weights.values()))


def train_all(configs: list[RunConfig]) -> None:
    for config in configs:
        run(config)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "zero_stages", [(0, 3), pytest.param((0, 1, 2, 3), marks=pytest.mark.long)], ids=["least and most", "all"]
)
def test_a_recipe_trains_alike_under_zero_and_torch(name: str, zero_stages: tuple[int, ...], small, run_ranks) -> None:
    with_queue = not allowed(small(name, 1))
    configs = [small(name, zero) for zero in sorted({min(zero, 2 if with_queue else 3) for zero in zero_stages})]
    configs.append(small(name, 1 if with_queue else 3, "torch"))
    run_ranks(2, train_all, configs)
    before = [build_encoder(config.model, config.seed).state_dict() for config in configs]
    for place, stage in enumerate(configs[0].stages):
        after = [load_file(config.output_dir / stage.name / "export" / EXPORT_FILE) for config in configs]
        steps = [{key: after[i][key] - before[i][key] for key in after[i]} for i in range(len(configs))]
        assert before[0].keys() == after[0].keys()
        assert (length(steps[0]) > 0) == (stage.kind != "identity_prompt")
        for step in steps[1:]:
            difference = {key: step[key] - steps[0][key] for key in step}
            assert length(difference) <= 0.1 * length(steps[0]), f"{name}, {stage.name}"
        before = after
        curves = []
        for config in configs:
            folder = config.output_dir / stage.name
            manifest = json.loads((folder / "export" / "manifest.json").read_text())
            assert manifest["steps"] == STEPS and manifest["trainable"]
            scores = json.loads((folder / "metrics.json").read_text())
            asked = config.stages[place].evaluation
            assert set(scores["t2i"]) == set(asked.t2i) and set(scores["i2i"]) == set(asked.i2i)
            engine = config.stages[place].engine
            assert bool(asked.t2i or asked.i2i) == is_scored(engine.zero_stage, engine.backend)
            curves.append([point["loss"] for point in json.loads((folder / "training.json").read_text())])
        assert all(len(curve) == STEPS for curve in curves)
        for curve in curves[1:]:
            assert curve == pytest.approx(curves[0], rel=1e-4), f"{name}, {stage.name}"
