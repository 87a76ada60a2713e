"""Towers with prompts, a second class token and tokens, in every precision and ZeRO stage and on several ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig, TextLoss
from reid_dist.distributed import all_gather_with_grad, rank, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch, Features, State
from reid_dist.stages.prompt import PromptStage

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "vit_tiny.json")
PROMPTS = {"visual_length": 2, "visual_depth": 3, "text_length": 3, "text_depth": 2}
ADAMW = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.0)
SGD = OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
MODES = ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "pure_bf16"), (3, "fp32"), (3, "bf16"), (3, "pure_bf16"))
ROUNDING = ((2, "pure_bf16"), (3, "bf16"))
ROWS = 8


class AllOutputs(Stage):
    """Pulls everything that the towers give towards the mean over the rows of all ranks."""

    def features(self, batch: Batch, state: State) -> Features:
        output = self.encoder(batch["image_BCHW"], batch["token_BL"], details=True)
        again = self.encoder.text(batch["token_BL"][:, ::2], details=True)
        parts = (output.image_tokens, output.text_tokens, again.tokens)
        found = {f"{i}_BD": part.float().mean(1) for i, part in enumerate(parts)}
        found |= {"image_BD": output.image_features, "text_BD": output.text_features}
        return found | {"i2i_BD": output.i2i_features}

    def loss(self, features: Features, batch: Batch, states: list[State]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = []
        for feature_BD in features.values():
            all_GD = all_gather_with_grad(feature_BD.float())
            losses.append((all_GD - all_GD.mean(0)).square().mean() + (all_GD.mean() - 1).square())
        return torch.stack(losses).sum(), {}


def make_stage(kind: str = "all", train_prompts: bool = True) -> Stage:
    torch.manual_seed(0)
    model = ModelConfig(architecture=ARCHITECTURE, image_size=(32, 16), prompts=PROMPTS, dual_token=True)
    encoder = build_dual_encoder(model)
    encoder.set_grad_checkpointing(kind == "recomputed")
    stage = PromptStage(encoder, TextLoss()) if kind == "prompt" else AllOutputs(encoder, (), train_prompts)
    return stage.train()


def make_batch() -> dict[str, Tensor]:
    """This rank's share of eight rows."""
    generator = torch.Generator().manual_seed(0)
    token_BL = torch.randint(3, 400, (ROWS, 20), generator=generator)
    token_BL[:, -1] = 511
    image_BCHW = torch.randint(0, 256, (ROWS, 3, 32, 16), generator=generator, dtype=torch.uint8)
    own = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
    return {"image_BCHW": image_BCHW[own], "token_BL": token_BL[own], "pid_B": torch.arange(ROWS)[own]}


def train(
    kind: str, mode: tuple[int, str], train_prompts: bool = True, optimizer: OptimizerConfig = ADAMW
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps, and the weights after them."""
    raw = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if mode[0] == 3 else {}
    config = EngineConfig(zero_stage=mode[0], precision=mode[1], deepspeed=raw)
    engine = DeepSpeedEngine(make_stage(kind, train_prompts), config, optimizer, ROWS // world_size())
    losses = []
    for _ in range(3):
        loss = engine(make_batch())["loss"]
        engine.backward(loss)
        assert engine.step()
        losses.append(float(loss.detach()))
    weights = engine.full_parameters()
    engine.close()
    return losses, {name.removeprefix("encoder."): value for name, value in weights.items()}


def train_in_modes(kind: str, modes: tuple, train_prompts: bool = True) -> dict:
    return {mode: train(kind, mode, train_prompts) for mode in modes}


def train_plain_and_recomputed() -> tuple[dict, dict]:
    return train_in_modes("all", MODES), train_in_modes("recomputed", ((0, "fp32"), (3, "bf16")))


@pytest.mark.slow
def test_every_precision_and_zero_stage_trains_prompts_and_tokens_alike(run_ranks) -> None:
    found, recomputed = run_ranks(1, train_plain_and_recomputed)[0]
    exact = found[0, "fp32"][0]
    assert exact[2] < 0.9 * exact[0]
    for (zero_stage, precision), (losses, _) in found.items():
        tolerance = {"fp32": 1e-5, "bf16": 0.03, "pure_bf16": 0.05}[precision]
        assert losses == pytest.approx(exact, rel=tolerance), (zero_stage, precision)
    for mode, (losses, _) in recomputed.items():
        assert losses == pytest.approx(found[mode][0], rel=1e-6), mode


def test_prompts_that_do_not_train_stay_bit_for_bit(run_ranks) -> None:
    before = make_stage().encoder.state_dict()
    for mode, (losses, weights) in run_ranks(1, train_in_modes, "all", ROUNDING, False)[0].items():
        assert losses[2] < losses[0], mode
        same = {name for name, value in before.items() if value.equal(weights[name])}
        assert same == {"visual.prompts", "text.prompts", "logit_scale"}, mode


def test_the_prompt_stage_moves_prompts_and_nothing_else(run_ranks) -> None:
    before = make_stage().encoder.state_dict()
    for mode, (_, weights) in run_ranks(1, train_in_modes, "prompt", ROUNDING)[0].items():
        moved = {name for name, value in before.items() if not value.equal(weights[name])}
        assert moved == {"visual.prompts", "text.prompts"}, mode


@pytest.mark.slow
def test_ranks_equal_one(run_ranks) -> None:
    ((expected, one),) = run_ranks(1, train, "all", (3, "fp32"), True, SGD)
    for losses, weights in run_ranks(4, train, "all", (3, "fp32"), True, SGD):
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, value in one.items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
