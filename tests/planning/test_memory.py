"""The plan of a dry run: parameters and activations counted without memory agree with a real model."""

from pathlib import Path

import pytest
import torch

from reid_dist.config import EngineConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.planning.memory import describe, plan_stage, state_bytes
from reid_dist.recipe_file import load_config
from reid_dist.stages import Surroundings, build_stage

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "configs" / "models" / "row_conv_tiny.json"
OVERRIDES = [f"model.architecture={ARCHITECTURE}", "stages.i2i.data.identities=30"]


def quickstart(*overrides: str):
    return load_config(ROOT / "configs" / "quickstart.yaml", [*OVERRIDES, "data.root=/nowhere", *overrides])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_parameters_are_those_of_the_real_stage(index: int) -> None:
    config = quickstart()
    stage = config.stages[index]
    module = build_stage(stage, build_dual_encoder(config.model), Surroundings(16, identities=30))
    plan = plan_stage(config, stage, 1)
    assert plan.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert plan.frozen == sum(p.numel() for p in module.parameters() if not p.requires_grad)


def test_activations_are_what_a_real_forward_saves() -> None:
    config = quickstart("data.global_batch_size=16")
    stage = config.stages[0]
    module = build_stage(stage, build_dual_encoder(config.model), Surroundings(16, identities=30)).train()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(
            {
                "image_BCHW": torch.zeros(16, 3, 64, 32, dtype=torch.uint8),
                "token_BL": torch.zeros(16, 40, dtype=torch.int64),
                "pid_B": torch.zeros(16, dtype=torch.int64),
            }
        )
    real = sum(storage.nbytes() for storage in saved.values())
    assert plan_stage(config, stage, 1).activation_bytes == pytest.approx(real, rel=0.05)


KEY = 128 * 4  # features of the quickstart's encoder, fp32


def queue_plan(world_size: int, *overrides: str):
    config = quickstart("stages.t2i.loss.queue_size=1000000", *overrides)
    return plan_stage(config, config.stages[2], world_size)


def test_the_plan_counts_queue_and_key_encoders_and_no_memory_is_taken_for_them() -> None:
    plan = queue_plan(1)
    trained = 4 * plan.trainable  # the towers, and a few buffers; the temperature has no copy
    queue = 1_000_000 * (2 * KEY + 4 + 8)
    assert plan.key_bytes == pytest.approx(queue + trained, rel=1e-3)
    assert plan_stage(quickstart("stages.t2i.loss={}"), quickstart().stages[0], 1).key_bytes == 0


def test_a_sharded_queue_is_shared_by_the_ranks_and_low_precision_halves_it() -> None:
    whole, sharded = queue_plan(4), queue_plan(4, "stages.t2i.loss.queue_sharded=true")
    assert sharded.key_bytes == pytest.approx(whole.key_bytes / 4, rel=0.02)
    assert queue_plan(1, "engine.precision=bf16").key_bytes == pytest.approx(1e6 * (KEY + 12), rel=0.02)


def test_key_encoders_keep_no_activations() -> None:
    config = quickstart("stages.t2i.loss={}", "data.global_batch_size=16")
    without = plan_stage(config, config.stages[2], 1).activation_bytes
    assert queue_plan(1, "data.global_batch_size=16").activation_bytes == pytest.approx(without, rel=0.1)


@pytest.mark.parametrize(
    ("zero_stage", "precision", "expected"),
    [
        (0, "fp32", 4 + 4 + 8),
        (1, "fp32", 4 + 4 + 12 / 4),
        (2, "fp32", 4 + (4 + 12) / 4),
        (3, "fp32", (4 + 4 + 12) / 4),
        (1, "pure_bf16", 2 + 2 + 12 / 4),
    ],
)
def test_state_of_one_gpu_of_four_follows_the_zero_paper(zero_stage: int, precision: str, expected: float) -> None:
    engine = EngineConfig(zero_stage=zero_stage, precision=precision)
    assert state_bytes(1000, 0, engine, world_size=4, adam=True) == pytest.approx(1000 * expected)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "swin_base_patch4_window7_224"])
def test_a_timm_tower_has_a_plan(name: str) -> None:
    """Its constructor looks at values, which tensors without memory do not have."""
    config = quickstart(f"model={{architecture: {name}, image_size: [64, 32]}}", "data.global_batch_size=2")
    plan = plan_stage(config, config.stages[0], 1)
    assert plan.trainable > 1e8 and plan.activation_bytes > 1e6


def test_more_ranks_take_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = describe(quickstart())
    assert "plan for 4 ranks" in text
    assert plan_stage(quickstart(), quickstart().stages[0], 4).micro_batch_size == 16


def test_ranks_that_cannot_share_the_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"data\.global_batch_size"):
        describe(quickstart())
