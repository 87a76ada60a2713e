"""CLIP-ReID's first stage on N ranks under every ZeRO stage: equal to one process, down to what it hands over."""

from pathlib import Path

import pytest
import torch

from reid_dist.config import EngineConfig, IdentityPromptLoss, ModelConfig, OptimizerConfig
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.distributed import mean_over_ranks, rank, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.identity_prompt import IdentityPromptStage

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "row_conv_tiny.json")
ROWS, IDENTITIES, STEPS = 8, 7, 3
OPTIMIZER = OptimizerConfig(name="sgd", lr=0.5, momentum=0.9, weight_decay=0.0)


def make_stage() -> IdentityPromptStage:
    torch.manual_seed(1)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    tokenizer = WordTokenizer(["a", "photo", "of", "person"], 40, 512)
    return IdentityPromptStage(encoder, IdentityPromptLoss(), Surroundings(identities=IDENTITIES, tokenizer=tokenizer))


def make_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        "image_BCHW": torch.randint(0, 256, (ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": torch.zeros(ROWS, 40, dtype=torch.int64),
        "pid_B": torch.randint(0, IDENTITIES, (ROWS,), generator=generator),
        "camid_B": torch.zeros(ROWS, dtype=torch.int64),
        "sample_id_B": torch.arange(ROWS),
    }


def reference() -> dict:
    stage = make_stage().train()
    optimizer = build_optimizer(parameter_groups(stage.trainable(), OPTIMIZER), OPTIMIZER)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = stage(make_batch(step))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "tokens": stage.prompts.token_CMW.detach(), **stage.handover({})}


def train(zero_stage: int) -> dict:
    stage = make_stage().train()
    rows = ROWS // world_size()
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=zero_stage), OPTIMIZER, rows)
    losses = []
    for step in range(STEPS):
        loss = engine({key: value[rank() * rows : (rank() + 1) * rows] for key, value in make_batch(step).items()})[
            "loss"
        ]
        engine.backward(loss)
        assert engine.step()
        losses.append(mean_over_ranks(loss).item())
    found = {"losses": losses, "tokens": engine.full_parameters()["prompts.token_CMW"], **stage.handover({})}
    engine.close()
    return found


def train_all() -> list[dict]:
    return [train(zero_stage) for zero_stage in (0, 1, 2, 3)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_tokens_and_handover_equal_a_single_process_on_every_rank(world: int, run_ranks) -> None:
    expected = reference()
    start = make_stage().prompts.token_CMW.detach()
    assert (expected["tokens"] - start).norm() > 0.01 * start.norm()
    for results in run_ranks(world, train_all):
        for zero_stage, found in enumerate(results):
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), zero_stage
            for name in ("identity_text_CD", "identity_text_log_scale", "tokens"):
                error = (found[name] - expected[name]).norm() / expected[name].norm()
                assert error < 1e-5, f"ZeRO {zero_stage}, {world} ranks, {name}: {error:.1e}"
