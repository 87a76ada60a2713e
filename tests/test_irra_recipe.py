"""configs/irra_vit_b16.yaml against the published optimizer, schedule and sizes (methods.md A5, section 2)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist.config import RunConfig, T2IStageConfig
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.optim import lr_factor, parameter_groups
from reid_dist.recipe_file import load_config
from reid_dist.stages import Stage, Surroundings, build_stage

EPOCHS, WARM_UP, LR = 60, 5, 1e-5
# Ours and the published module's name, in the order in which they are looked for.
RENAMED = {
    "encoder.visual": "base_model.visual",
    "encoder.text": "base_model",
    "text_losses.classifier.classifier": "classifier",
    "text_losses.cross_modal.cross_attention": "cross_attn",
    "text_losses.cross_modal.cross_blocks": "cross_modal_transformer.resblocks",
    "text_losses.cross_modal.norm_text": "ln_pre_t",
    "text_losses.cross_modal.norm_image": "ln_pre_i",
    "text_losses.cross_modal.norm_out": "ln_post",
    "text_losses.cross_modal.mlm_head": "mlm_head",
}


def published_setting(name: str) -> tuple[float, float]:
    """Learning rate and weight decay by the rules of A5."""
    lr, decay = LR, 4e-5
    if "cross" in name:
        lr = 5 * LR
    if "bias" in name:
        lr, decay = 2 * LR, 0.0
    if "classifier" in name or "mlm_head" in name:
        lr = 5 * LR
    return lr, decay


def published_name(name: str) -> str:
    for ours, theirs in RENAMED.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name} is not in IRRA")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(Path(__file__).parents[1] / "configs" / "irra_vit_b16.yaml")


@pytest.fixture(scope="module")
def stage(config: RunConfig) -> Stage:
    (only,) = config.stages
    assert isinstance(only, T2IStageConfig) and only.data.identities is not None
    with torch.device("meta"):
        encoder = build_dual_encoder(config.model)
        return build_stage(only, encoder, Surroundings(64, identities=only.data.identities))


def test_every_parameter_learns_and_decays_as_published(config: RunConfig, stage: Stage) -> None:
    groups: list[dict[str, Any]] = parameter_groups(stage.trainable(), config.stages[0].optimizer)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    expected = {name: published_setting(published_name(name)) for name in found}
    assert len(found) == 12 * 12 + 8 + 12 * 12 + 5 + 2 + 10 + 4 * 12 + 6
    for name, (lr, decay) in expected.items():
        assert found[name] == (pytest.approx(lr), decay), name
    assert {setting: list(expected.values()).count(setting) for setting in set(expected.values())} == {
        (LR, 4e-5): sum("bias" not in n and ("encoder" in n or "norm_" in n) for n in found),
        (5 * LR, 4e-5): 2 + 4 * 6 + 1 + 3,
        (2 * LR, 0.0): sum(n.endswith("bias") and "mlm_head" not in n and "classifier" not in n for n in found),
        (5 * LR, 0.0): 4,
    }


def test_adam_as_published(config: RunConfig) -> None:
    optimizer = config.stages[0].optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.eps) == ("adam", LR, (0.9, 0.999), 1e-3)
    assert config.stages[0].engine.max_grad_norm == 0


def test_epochs_and_the_factor_in_each(config: RunConfig) -> None:
    stage = config.stages[0]
    steps = math.ceil(68126 / stage.data.global_batch_size)  # training captions of CUHK-PEDES; the last batch is kept
    assert stage.data.global_batch_size == 64 and stage.data.items == "captions" and stage.steps == EPOCHS * steps
    for step in (*range(7 * steps), *range(50 * steps, stage.steps)):
        e = step // steps
        cosine = 0.5 * (1 + math.cos(math.pi * (e - WARM_UP) / (EPOCHS - WARM_UP)))
        expected = 0.1 + 0.9 * e / WARM_UP if e < WARM_UP else cosine
        assert lr_factor(stage.optimizer, step, stage.steps) == pytest.approx(expected, rel=1e-12), step


def test_sizes_and_constants(config: RunConfig, stage: Stage) -> None:
    encoder, (settings,) = stage.encoder, config.stages
    assert isinstance(settings, T2IStageConfig)
    assert encoder.features == 512 and (encoder.text_shape.context_length, encoder.text_shape.vocab_size) == (77, 49408)
    assert encoder.visual.positional_embedding.shape == (24 * 8 + 1, 768)
    loss = settings.loss
    assert (loss.temperature, loss.contrastive_weight, loss.label_smoothing, loss.mlm_depth) == (0.02, 0, 0, 4)
    assert (loss.sdm_weight, loss.identity_weight, loss.mlm_weight) == (1, 1, 1)
    assert (loss.mask, loss.mask_for, loss.mask_probability) == ("tokens", "all", 0.15)
    augment = settings.data.augment
    assert (augment.flip, augment.pad, augment.erase, augment.crop, augment.color) == (0.5, 10, 0.5, 1, 0)
    mean, std = config.model.image_mean, config.model.image_std
    # The published fill is the mean, put in after normalisation.
    assert augment.erase_fill == tuple(round(255 * (m + m * s)) for m, s in zip(mean, std, strict=True))
