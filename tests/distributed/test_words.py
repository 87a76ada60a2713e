"""TextReID's towers behind the engine, in every precision and ZeRO stage: frozen words, momentum keys, their start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig, TextLoss
from reid_dist.distributed import rank, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dictionary import Dictionary, write_dictionary
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.t2i import T2IStage

MODELS = Path(__file__).parents[2] / "configs" / "models"
ROWS, STEPS, MOMENTUM = 8, 3, 0.9
MODES = ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "pure_bf16"))
MODES += ((3, "fp32"), (3, "bf16"), (3, "pure_bf16"))
QUEUE = {"queue_size": 24, "momentum": MOMENTUM, "positives": "pair", "temperature": 0.07, "queue_mask": "batch"}
SGD = OptimizerConfig(name="sgd", lr=0.05, momentum=0.0, weight_decay=0.0)
RESNET = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words")
    (path / "resnet.json").write_text(json.dumps(RESNET))
    vectors_NW = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    write_dictionary(path / "words.safetensors", Dictionary([f"word{i}" for i in range(48)], vectors_NW), "")
    return path


def make_stage(folder: Path, tower: str, precision: str = "fp32", **loss: Any) -> T2IStage:
    architecture = folder / "resnet.json" if tower != "row_conv" else MODELS / "row_conv_tiny.json"
    words = {"dictionary": folder / "words.safetensors", "features": 8, "hidden": 10, "context_length": 9}
    kept = {"last_stride": 1} if tower != "row_conv" else {}
    projection = None if tower == "resnet without a further map" else 7
    torch.manual_seed(0)
    encoder = build_dual_encoder(
        ModelConfig(architecture=str(architecture), image_size=(64, 32), word_gru=words, projection=projection, **kept)
    )
    run = Surroundings(ROWS // world_size(), seed=3, identities=4, precision=precision)
    return T2IStage(encoder, TextLoss(**loss), run=run).train()


def make_batch(step: int) -> dict[str, Tensor]:
    """This rank's share of eight rows."""
    generator = torch.Generator().manual_seed(step)
    token_BL = torch.randint(1, 50, (ROWS, 9), generator=generator)
    for row in range(ROWS):
        token_BL[row, 1 + row :] = 0
    image_BCHW = torch.randint(0, 256, (ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8)
    whole = {"image_BCHW": image_BCHW, "token_BL": token_BL, "pid_B": torch.arange(ROWS) // 2}
    whole["sample_id_B"] = torch.arange(ROWS)
    return {name: x[rank() * ROWS // world_size() : (rank() + 1) * ROWS // world_size()] for name, x in whole.items()}


def train(folder: Path, mode: tuple[int, str], tower: str, loss: dict[str, Any]) -> dict[str, Any]:
    """Losses, the weights after them, and the keys' averages at the start and at the end."""
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if mode[0] == 3 else {}
    stage = make_stage(folder, tower, mode[1], **loss)
    config = EngineConfig(zero_stage=mode[0], precision=mode[1], deepspeed=raw)
    engine = DeepSpeedEngine(stage, config, SGD, ROWS // world_size())
    stage.start(engine.exact_parameters)
    found: dict[str, Any] = {"losses": [], "keys": [clone(stage)]}
    for step in range(STEPS):
        output = engine(make_batch(step))
        engine.backward(output["loss"])
        assert engine.step()
        stage.after_step([output["state"]], True, engine.exact_parameters)
        found["losses"].append(float(output["loss"].detach()))
    found |= {"weights": engine.full_parameters(), "keys": [*found["keys"], clone(stage)]}
    engine.close()
    return found


def clone(stage: T2IStage) -> dict[str, Tensor]:
    return {} if stage.moco is None else {n: x.float().clone() for n, x in stage.moco.key_encoder.state().items()}


def train_in_modes(folder: Path, modes: tuple, tower: str, loss: dict[str, Any]) -> dict:
    return {mode: train(folder, mode, tower, loss) for mode in modes}


@pytest.mark.slow
def test_every_precision_and_zero_stage_trains_alike_and_leaves_the_words(folder: Path, run_ranks) -> None:
    before = make_stage(folder, "row_conv", temperature=0.1).encoder.state_dict()
    found = run_ranks(1, train_in_modes, folder, MODES, "row_conv", {"temperature": 0.1})[0]
    exact = found[0, "fp32"]
    assert exact["losses"][-1] != exact["losses"][0]
    for (zero_stage, precision), result in found.items():
        tolerance = {"fp32": 1e-5, "bf16": 0.03, "pure_bf16": 0.05}[precision]
        assert result["losses"] == pytest.approx(exact["losses"], rel=tolerance), (zero_stage, precision)
        same = {name for name, x in before.items() if x.equal(result["weights"][f"encoder.{name}"])}
        assert same == {"text.words", "logit_scale"}, (zero_stage, precision)


@pytest.mark.slow
def test_ranks_equal_one_with_the_queue(folder: Path, run_ranks) -> None:
    loss = {**QUEUE, "key_head": "live"}
    ((expected),) = run_ranks(1, train, folder, (0, "fp32"), "row_conv", loss)
    for found in run_ranks(2, train, folder, (2, "fp32"), "row_conv", loss):
        for part in ("weights", "keys"):
            pairs = zip(expected[part], found[part], strict=True) if part == "keys" else [(expected[part], found[part])]
            for one, two in pairs:
                assert set(one) == set(two)
                for name, tensor in one.items():
                    torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


POOL = {f"encoder.visual.attnpool.{p}_proj.{x}" for p in "qkvc" for x in ("weight", "bias")}
MAP = "encoder.text.word_map.weight"  # its bias is 0 before and after


@pytest.mark.parametrize(("tower", "mode"), [("resnet", (0, "fp32")), ("row_conv", (2, "pure_bf16"))])
def test_keys_that_start_redrawn_differ_there_alone_and_follow_by_momentum(tower, mode, folder, run_ranks) -> None:
    one, other = run_ranks(2, train, folder, mode, tower, {**QUEUE, "key_start": "redrawn"})
    before = {f"encoder.{name}": x for name, x in make_stage(folder, tower).encoder.state_dict().items()}
    start, end = one["keys"]
    redrawn = {name for name, x in start.items() if not x.equal(before[name])}
    assert redrawn == ({MAP} | POOL if tower == "resnet" else {MAP})
    assert all(x.equal(other["keys"][0][name]) for name, x in start.items())
    assert float(start[MAP].std()) == pytest.approx((2 / len(start[MAP])) ** 0.5, rel=0.3)
    apart = [float((start[MAP] - before[MAP]).norm()), float((end[MAP] - one["weights"][MAP]).norm())]
    assert apart[1] == pytest.approx(MOMENTUM**STEPS * apart[0], rel=0.05)
    assert end["encoder.text.words"].equal(before["encoder.text.words"])


def test_a_live_head_is_not_drawn(folder: Path, run_ranks) -> None:
    loss = {**QUEUE, "key_start": "redrawn", "key_head": "live"}
    pool = "encoder.visual.attnpool.c_proj"
    for tower, head in (("resnet", "encoder.visual.projection_head"), ("resnet without a further map", pool)):
        (found,) = run_ranks(1, train, folder, (0, "fp32"), tower, loss)
        before = {f"encoder.{name}": x for name, x in make_stage(folder, tower).encoder.state_dict().items()}
        for name in (f"{head}.weight", f"{head}.bias", "encoder.text.projection.weight"):
            assert found["keys"][0][name].equal(before[name]), name
            assert found["keys"][1][name].equal(found["weights"][name]), name
        assert found["keys"][0][f"{pool}.weight"].equal(before[f"{pool}.weight"]) == (head == pool)


def test_towers_without_such_maps_refuse() -> None:
    vit = build_dual_encoder(ModelConfig(architecture=str(MODELS / "vit_tiny.json"), image_size=(64, 32)))
    with pytest.raises(UserError, match=r"loss\.key_start: redrawn .* use copy"):
        T2IStage(vit, TextLoss(**QUEUE, key_start="redrawn"), run=Surroundings(ROWS))
