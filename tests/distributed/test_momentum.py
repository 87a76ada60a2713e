"""Key encoders behind the engine: on 2 ranks, in every ZeRO stage and precision, they follow the exact fp32 weights.

Three independent views of the weights: `exact_parameters` feeds the key encoder; the pieces of DeepSpeed's own
masters, put together in the parent, are averaged in plain torch; and a plain torch loop trains without an engine.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from reid_dist.distributed import rank
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.momentum import MomentumEncoder
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch, StageOutput

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "row_conv_tiny.json")
SGD = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, bias_lr_multiplier=2.0)
MODES = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16", "pure_bf16")]
MODES.remove((0, "pure_bf16"))  # refused by the config: no fp32 masters
RANKS, ROWS, STEPS, ACCUMULATION = 2, 3, 2, 2
MOMENTUM = 0.9


class TowardsTargets(Stage):
    """Features towards fixed targets: a loss of this rank alone, so a twin can add up the ranks as the engine does."""

    def __init__(self, dtype: torch.dtype = torch.float32, architecture: str = ARCHITECTURE) -> None:
        torch.manual_seed(0)
        super().__init__(build_dual_encoder(ModelConfig(architecture=architecture, image_size=(64, 32))))
        self.key_encoder = MomentumEncoder(self.encoder, ("visual", "text"), MOMENTUM, dtype=dtype)

    def forward(self, batch: Batch) -> StageOutput:
        output = self.encoder(batch["image_BCHW"], batch["token_BL"])
        features = {"visual": output.image_features, "text": output.text_features}
        keys = {
            "visual": self.key_encoder.encode_image(batch["image_BCHW"]),
            "text": self.key_encoder.encode_text(batch["token_BL"]),
        }
        targets = F.one_hot(batch["pid_B"], output.image_features.shape[1])
        loss = sum(F.mse_loss(x.float(), targets.float()) for x in features.values()) + output[2].square().sum()
        errors = {tower: (keys[tower] - x).norm() / x.norm() for tower, x in features.items()}
        return {"loss": loss, "metrics": errors, "state": {}}


def make_batch(step: int, micro_step: int, owner: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_step + owner)
    token = torch.randint(3, 400, (ROWS, 40), generator=generator)
    token[:, -1] = 511
    return {
        "image_BCHW": torch.randint(0, 256, (ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.randint(0, 8, (ROWS,), generator=generator),
    }


def pieces(parameter: torch.nn.Parameter) -> tuple[torch.Size, int, Tensor]:
    """(whole shape, start, values) of the fp32 truth that this rank holds, straight from DeepSpeed's storage."""
    from deepspeed.utils import safe_get_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        own = safe_get_local_fp32_param(parameter) if parameter.requires_grad else parameter.ds_tensor
        return parameter.ds_shape, rank() * own.numel(), own.detach().float().clone()
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return parameter.shape, 0, torch.empty(0)
        return parameter.shape, mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach().clone()
    return parameter.shape, 0, parameter.detach().float().flatten().clone()


def held(parameters: dict[str, torch.nn.Parameter]) -> dict[str, tuple[torch.Size, int, Tensor]]:
    return {name: pieces(parameter) for name, parameter in parameters.items()}


def whole(parts: list[tuple[torch.Size, int, Tensor]]) -> Tensor:
    full = torch.full((parts[0][0].numel(),), torch.nan)
    for _, start, values in parts:
        full[start : start + values.numel()] = values[: full.numel() - start]
    assert not full.isnan().any()
    return full.view(parts[0][0])


def follow(mode: tuple[int, str]) -> dict[str, Any]:
    """Trains on this rank; what the key encoder became, and this rank's pieces of the weights at each update."""
    zero_stage, precision = mode
    stage = TowardsTargets(torch.bfloat16 if precision == "pure_bf16" else torch.float32).train()
    keys = stage.key_encoder
    # All parameters count as small for ZeRO 3 here, and it would leave them whole.
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {}
    config = EngineConfig(
        zero_stage=zero_stage, precision=precision, gradient_accumulation_steps=ACCUMULATION, deepspeed=raw
    )
    engine = DeepSpeedEngine(stage, config, SGD, ROWS)
    keys.start(engine.exact_parameters(keys.names))
    trained = {name: p for name, p in stage.named_parameters() if name in keys.names}
    trail, history, errors = [held(trained)], [clone(keys.state())], []
    for step in range(STEPS):
        for micro_step in range(ACCUMULATION):
            output = engine(make_batch(step, micro_step, rank()))
            engine.backward(output["loss"])
            updated = engine.step()
            assert updated == (micro_step == ACCUMULATION - 1)
            if updated:
                keys.update(engine.exact_parameters(keys.names))
                trail.append(held(trained))
            history.append(clone(keys.state()))
            errors.append({tower: float(x.detach()) for tower, x in output["metrics"].items()})
    found = {"history": history, "trail": trail, "errors": errors, "digest": int(keys.digest())}
    engine.close()
    return found


def follow_all() -> dict[tuple[int, str], dict[str, Any]]:
    return {mode: follow(mode) for mode in MODES}


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def plain_twin(precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One process without an engine, the ranks' gradients averaged. Returns the average's start and its end."""
    stage = TowardsTargets().train()
    optimizer = build_optimizer(parameter_groups(stage.trainable(), SGD), SGD)
    average = {n: p.detach().clone() for n, p in stage.named_parameters() if n in stage.key_encoder.names}
    start = clone(average)
    for step in range(STEPS):
        gradients = []
        for owner in range(RANKS):
            optimizer.zero_grad()
            for micro_step in range(ACCUMULATION):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = stage(make_batch(step, micro_step, owner))["loss"]
                (loss / ACCUMULATION).backward()
            gradients.append([p.grad for p in stage.parameters()])
        for parameter, *own in zip(stage.parameters(), *gradients, strict=True):
            parameter.grad = sum(own) / RANKS
        optimizer.step()
        for name, parameter in stage.named_parameters():
            if name in average:
                average[name].lerp_(parameter.detach(), 1 - MOMENTUM)
    return start, average


def relative_norm(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = torch.cat([(found[name].double() - x.double()).flatten() for name, x in expected.items()])
    return float(difference.norm() / torch.cat([x.double().flatten() for x in expected.values()]).norm())


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert set(found) == set(expected)
    return [name for name, x in expected.items() if not torch.equal(found[name], x)]


@pytest.fixture(scope="module")
def runs(run_ranks) -> list[dict]:
    return run_ranks(RANKS, follow_all)


def masters(mode: tuple[int, str], runs: list[dict]) -> list[dict[str, Tensor]]:
    """The whole fp32 weights at the start and after each step, put together from the ranks' pieces."""
    trails = [run[mode]["trail"] for run in runs]
    return [{name: whole([trail[i][name] for trail in trails]) for name in trails[0][0]} for i in range(STEPS + 1)]


def averaged(start: dict[str, Tensor], steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = clone(start)
    for weights in steps:
        for name, weight in weights.items():
            average[name].lerp_(weight, 1 - MOMENTUM)
    return average


def test_it_is_the_average_of_the_masters_bit_for_bit(runs: list[dict]) -> None:
    start = {n: p.detach() for n, p in TowardsTargets().named_parameters()}
    for mode in MODES:
        steps = masters(mode, runs)
        assert different(steps[0], {name: start[name] for name in steps[0]}) == [], mode
        assert all(different(old, new) for old, new in itertools.pairwise(steps)), mode
        average = averaged(steps[0], steps[1:])
        for run in runs:
            assert different(run[mode]["history"][-1], average) == [], mode


def test_a_micro_step_without_an_update_changes_nothing(runs: list[dict]) -> None:
    for mode in MODES:
        for run in runs:
            history = run[mode]["history"]
            for step in range(STEPS):
                before, skipped, after = history[step * ACCUMULATION :][: ACCUMULATION + 1]
                assert different(skipped, before) == [] and different(after, skipped), mode


def test_keys_of_equal_weights_are_the_engine_s_features(runs: list[dict]) -> None:
    """The key forward computes in the precision of the anchors', autocast or cast."""
    for mode in MODES:
        for run in runs:
            errors = run[mode]["errors"]
            for tower in ("visual", "text"):
                assert max(found[tower] for found in errors[:ACCUMULATION]) < (1e-5 if mode[1] == "fp32" else 0.01), (
                    mode
                )
                assert errors[-1][tower] > 0.01, mode


def test_ranks_agree(runs: list[dict]) -> None:
    for mode in MODES:
        assert runs[0][mode]["digest"] == runs[1][mode]["digest"], mode


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_equals_plain_torch(precision: str, runs: list[dict]) -> None:
    start, average = plain_twin(precision)
    assert relative_norm(start, average) > 1e-3, "the weights moved too little to show anything"
    for zero_stage, _ in [mode for mode in MODES if mode[1] == precision]:
        found = runs[0][zero_stage, precision]["history"][-1]
        if zero_stage == 0 or (zero_stage, precision) == (1, "fp32"):
            assert different(found, average) == [], zero_stage
        # With autocast DeepSpeed averages the gradients of linear layers in bf16 from ZeRO 1 on, and gathers their
        # weights in bf16 under ZeRO 3: other weights, so another average.
        assert relative_norm(found, average) < {"fp32": 1e-6, "bf16": 1e-4}[precision], zero_stage


def test_weights_of_bf16_or_of_another_step_would_be_found(runs: list[dict]) -> None:
    """The first test can fail: the module's rounded weights, or those before the step, give another average."""
    for mode in [mode for mode in MODES if mode[1] == "pure_bf16"]:
        steps = masters(mode, runs)
        for wrong in ([{n: x.bfloat16().float() for n, x in step.items()} for step in steps[1:]], steps[:-1]):
            average = averaged(steps[0], wrong)
            assert relative_norm(average, runs[0][mode]["history"][-1]) > 1e-5


RESNET = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "text_cfg": {"context_length": 40, "vocab_size": 512, "width": 16, "heads": 2, "layers": 1},
}


def follow_resnet(architecture: str) -> tuple[int, dict[str, Tensor], list[str]]:
    stage = TowardsTargets(architecture=architecture).train()
    keys = stage.key_encoder
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=2), SGD, ROWS)
    keys.start(engine.exact_parameters(keys.names))
    engine.backward(engine(make_batch(0, 0, rank()))["loss"])
    assert engine.step()
    keys.update(engine.exact_parameters(keys.names))
    buffers = {name: buffer.clone() for name, buffer in stage.named_buffers() if name in keys.names}
    wrong = [name for name, buffer in buffers.items() if not keys.state()[name].equal(buffer)]
    engine.close()
    return int(keys.digest()), buffers, wrong


def test_running_statistics_are_the_rank_s_own_and_no_part_of_the_agreement(run_ranks, tmp_path: Path) -> None:
    (tmp_path / "resnet.json").write_text(json.dumps(RESNET))
    (digest, buffers, wrong), (other_digest, other_buffers, other_wrong) = run_ranks(
        RANKS, follow_resnet, str(tmp_path / "resnet.json")
    )
    assert wrong == other_wrong == []
    tracked = {name for name in buffers if name.endswith("tracked")}
    assert tracked and all(buffers[name] == other_buffers[name] == 1 for name in tracked)
    assert all(not buffers[name].equal(other_buffers[name]) for name in buffers.keys() - tracked)
    assert digest == other_digest
