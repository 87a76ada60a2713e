"""The engine: DeepSpeed's dictionary, precision, clipping, accumulation, the temperature's clamp."""

import math
from pathlib import Path

import pytest
import torch

from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainLoss, TextLoss
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine, deepspeed_config
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.base import Stage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "row_conv_tiny.json")
ADAMW = OptimizerConfig(name="adamw", lr=1e-3)
SGD = OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
MODES = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
MODES += [(zero, "pure_bf16") for zero in (1, 2, 3)]


def make_stage(freeze: tuple[str, ...] = ()) -> Stage:
    torch.manual_seed(0)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    return T2IStage(encoder, TextLoss(), freeze) if freeze else PretrainStage(encoder, PretrainLoss())


def make_batch(rows: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(3, 400, (rows, 40), generator=generator)
    token[:, -1] = 511
    return {
        "image_BCHW": torch.randint(0, 256, (rows, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.arange(rows),
    }


def test_a_raw_key_leaves_its_neighbours_alone() -> None:
    """Replacing the whole of `zero_optimization` would switch ZeRO off in silence."""
    raw = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    found = deepspeed_config(EngineConfig(zero_stage=2, max_grad_norm=1, deepspeed=raw), micro_batch_size=4)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 50_000_000}
    assert (found["wall_clock_breakdown"], found["train_micro_batch_size_per_gpu"]) == (True, 4)


def test_a_raw_key_wins() -> None:
    found = deepspeed_config(EngineConfig(deepspeed={"steps_per_print": 3}), micro_batch_size=4)
    assert found["steps_per_print"] == 3


@pytest.mark.parametrize("raw", [{"gradient_accumulation_steps": 4}, {"bf16": {}}, {"zero_optimization": {"stage": 3}}])
def test_a_raw_key_that_is_ours_is_refused(raw: dict) -> None:
    """Two truths about the batch or the precision would train something else than the plan says."""
    with pytest.raises(ValueError, match="set that instead"):
        EngineConfig(deepspeed=raw)


def losses_of(mode: tuple[int, str], steps: int) -> list[float]:
    engine = DeepSpeedEngine(make_stage().train(), EngineConfig(zero_stage=mode[0], precision=mode[1]), ADAMW, 8)
    found = []
    for _ in range(steps):
        loss = engine(make_batch())["loss"]
        engine.backward(loss)
        assert engine.step()
        found.append(float(loss.detach()))
    engine.close()
    return found


def losses_of_all_modes() -> dict[tuple[int, str], list[float]]:
    return {mode: losses_of(mode, 5) for mode in MODES}


def test_every_precision_and_zero_stage_learns_and_agrees(run_ranks) -> None:
    found = run_ranks(1, losses_of_all_modes)[0]
    for (zero_stage, precision), losses in found.items():
        assert losses[-1] < losses[0], (zero_stage, precision)
        # bf16 rounds at 0.4 %; the loss falls from 2.7 to 0.1 in these steps.
        tolerance = {"fp32": 1e-4, "bf16": 0.05, "pure_bf16": 0.1}[precision]
        assert losses == pytest.approx(found[0, "fp32"], abs=tolerance), (zero_stage, precision)


def clamped(mode: tuple[int, str]) -> tuple[float, float]:
    """The temperature pushed upwards by its gradient: as exported, and as the next forward uses it."""
    stage = make_stage().train()
    stage.encoder.logit_scale.data.fill_(4.60)
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=mode[0], precision=mode[1]), SGD, 8)
    for _ in range(3):
        output = engine(make_batch())
        engine.backward(-output["metrics"]["logit_scale"].sum() + 0 * output["loss"])
        engine.step()
    used = float(engine(make_batch())["metrics"]["logit_scale"].detach())
    exported = float(engine.full_parameters(["encoder.logit_scale"])["encoder.logit_scale"])
    engine.close()
    return exported, used


def clamped_in_all_modes() -> dict[tuple[int, str], tuple[float, float]]:
    return {mode: clamped(mode) for mode in MODES}


def test_the_temperature_is_clamped_in_fp32_in_every_mode(run_ranks) -> None:
    for mode, (exported, used) in run_ranks(1, clamped_in_all_modes)[0].items():
        assert exported == pytest.approx(math.log(100), abs=1e-6), mode
        assert used == pytest.approx(100.0, abs=1e-3), mode


ROUNDING_MODES = [(1, "pure_bf16"), (2, "pure_bf16"), (3, "pure_bf16"), (3, "bf16")]


def changed_weights(mode: tuple[int, str]) -> list[str]:
    """Names of weights that come out rounded although nothing was learned."""
    stage = make_stage(freeze=("visual",)).train()
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if mode[0] == 3 else {}
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=mode[0], precision=mode[1], deepspeed=raw), ADAMW, 8)
    # Under ZeRO 3 a forward gathers weights in bf16.
    engine(make_batch())
    after = engine.full_parameters()
    engine.close()
    return [name for name, value in before.items() if not torch.equal(after[name], value)]


def changed_weights_in_rounding_modes() -> dict[tuple[int, str], list[str]]:
    return {mode: changed_weights(mode) for mode in ROUNDING_MODES}


def test_bf16_rounds_neither_frozen_weights_nor_masters(run_ranks) -> None:
    """2 ranks do not divide a parameter of one element."""
    for found in run_ranks(2, changed_weights_in_rounding_modes):
        assert found == {mode: [] for mode in ROUNDING_MODES}


def weights_that_a_forward_changes(threshold: int) -> list[str]:
    """Names, once a step has taught ZeRO 3 which gathered weights to keep for the backward."""
    stage = make_stage(freeze=("visual",)).train()
    start = {name: p.detach().clone() for name, p in stage.named_parameters()}
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=3, precision="bf16", deepspeed=raw), ADAMW, 8)
    engine.backward(engine(make_batch())["loss"])
    assert engine.step()
    before = engine.full_parameters()
    engine(make_batch())
    after = engine.full_parameters()
    frozen = [name for name, value in start.items() if "visual" in name and not value.equal(after[name])]
    engine.close()
    return frozen + [name for name, value in before.items() if not value.equal(after[name])]


def weights_that_a_forward_changes_under_any_threshold() -> list[str]:
    return weights_that_a_forward_changes(0) + weights_that_a_forward_changes(100_000)


def test_weights_are_exact_between_a_forward_and_its_step(run_ranks) -> None:
    """DeepSpeed's own gather takes what autocast rounded for the forward."""
    assert run_ranks(2, weights_that_a_forward_changes_under_any_threshold) == [[], []]


WANTED = ["counter", "encoder.logit_scale", "encoder.visual.stem.weight"]


def exact_parameters() -> dict[str, object]:
    stage = make_stage().train()
    stage.register_buffer("counter", torch.arange(3))
    stage.register_buffer("scratch", torch.zeros(1), persistent=False)
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=2, precision="bf16"), ADAMW, 8)
    own = {**dict(stage.named_parameters()), "counter": stage.counter}
    found = dict(engine.exact_parameters())
    copies = engine.full_parameters(WANTED)
    copies["counter"] += 1
    try:
        refusal = str(next(engine.exact_parameters([*WANTED, "scratch", "encoder.visual.sten"])))
    except ValueError as error:
        refusal = str(error)
    engine.close()
    return {
        "names": list(found),
        "own names": list(own),
        "copied": [name for name, tensor in found.items() if tensor.data_ptr() != own[name].data_ptr()],
        "with gradient": [name for name, tensor in found.items() if tensor.requires_grad],
        "dtypes": {name: tensor.dtype for name, tensor in found.items() if tensor.dtype != torch.float32},
        "asked for": [name for name, _ in engine.exact_parameters(iter(WANTED))],
        "full": list(copies),
        "counter": stage.counter.tolist(),
        "refusal": refusal,
    }


def test_exact_parameters_are_the_weights_themselves_where_they_are_whole(run_ranks) -> None:
    [found] = run_ranks(1, exact_parameters)
    assert found["names"] == found["own names"] and len(found["names"]) > 10
    assert found["copied"] == found["with gradient"] == []
    assert found["dtypes"] == {"counter": torch.int64}
    assert set(found["asked for"]) == set(found["full"]) == set(WANTED)
    assert found["counter"] == [0, 1, 2], "what is given out whole is a copy"
    assert "has no encoder.visual.sten, scratch" in found["refusal"]


def test_pure_bf16_with_a_batch_norm_is_refused_on_a_cpu(monkeypatch) -> None:
    """torch would stop in the first forward: weights in bf16, statistics in fp32."""
    stage = make_stage()
    stage.encoder.visual.norm = torch.nn.BatchNorm2d(3)
    monkeypatch.setattr("reid_dist.engine.deepspeed_engine.local_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match=r"engine\.precision: pure_bf16 .*encoder\.visual\.norm.* set bf16 or fp32"):
        DeepSpeedEngine(stage, EngineConfig(zero_stage=1, precision="pure_bf16"), ADAMW, 8)


def norm_and_step(limit: float) -> tuple[float, float]:
    """Gradient norm before clipping, and how far one SGD step of lr 0.1 moved all weights."""
    stage = make_stage().train()
    before = torch.cat([p.detach().flatten().clone() for p in stage.parameters()])
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=1, max_grad_norm=limit), SGD, 8)
    engine.backward(engine(make_batch())["loss"])
    engine.step()
    after = engine.full_parameters()
    moved = torch.cat([after[name].flatten() for name, _ in stage.named_parameters()]) - before
    norm = engine.gradient_norm()
    engine.close()
    return norm, float(moved.norm())


def test_clipping_bounds_the_step_and_not_the_reported_norm(run_ranks) -> None:
    free_norm, free_step = run_ranks(1, norm_and_step, 0.0)[0]
    clipped_norm, clipped_step = run_ranks(1, norm_and_step, 0.5)[0]
    assert free_norm == pytest.approx(clipped_norm, rel=1e-4)
    assert free_norm > 0.5
    assert free_step == pytest.approx(0.1 * free_norm, rel=1e-3)
    assert clipped_step == pytest.approx(0.1 * 0.5, rel=1e-3)


def accumulated(accumulation: int) -> tuple[list[bool], torch.Tensor]:
    """Two micro-batches, each contrasted within itself; returns what `step` said and one weight."""
    stage = make_stage().train()
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=1, gradient_accumulation_steps=accumulation), SGD, 8)
    said = []
    for seed in range(2):
        engine.backward(engine(make_batch(seed=seed))["loss"])
        said.append(engine.step())
    weight = engine.full_parameters(["encoder.visual.stem.weight"])["encoder.visual.stem.weight"]
    engine.close()
    return said, weight


def test_accumulation_averages_the_gradients_of_its_micro_batches(run_ranks) -> None:
    said, weight = run_ranks(1, accumulated, 2)[0]
    assert said == [False, True]
    stage = make_stage().train()
    loss = sum(stage(make_batch(seed=seed))["loss"] for seed in range(2)) / 2
    loss.backward()
    expected = stage.encoder.visual.stem.weight.detach() - 0.1 * stage.encoder.visual.stem.weight.grad
    assert torch.allclose(weight, expected, atol=1e-6)
