"""configs/textreid_rn50.yaml and rn101 against the published sizes, losses and schedule (methods.md 3.3-3.7)."""

import inspect
from pathlib import Path

import pytest
import torch

from reid_dist.config import RunConfig, T2IStageConfig
from reid_dist.losses.alignment import alignment_loss
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.word_tower import WordGRU
from reid_dist.optim import lr_factor, parameter_groups
from reid_dist.recipe_file import load_config
from reid_dist.stages import Surroundings, build_stage

CONFIGS = Path(__file__).parents[1] / "configs"
LR, DECAY = 1e-4, 4e-5


@pytest.fixture(scope="module", params=["textreid_rn50", "textreid_rn101"])
def config(request: pytest.FixtureRequest) -> RunConfig:
    return load_config(CONFIGS / f"{request.param}.yaml")


@pytest.fixture(scope="module")
def stage_config(config: RunConfig) -> T2IStageConfig:
    (stage,) = config.stages
    assert isinstance(stage, T2IStageConfig)
    return stage


def test_both_differ_in_the_image_tower_alone(config: RunConfig) -> None:
    changes = ["model.architecture=any", "output_dir=any"]
    assert load_config(CONFIGS / "textreid_rn50.yaml", changes) == load_config(CONFIGS / "textreid_rn101.yaml", changes)
    assert config.model.architecture == f"{config.output_dir.name.removeprefix('textreid_').upper()}-quickgelu"


def test_losses(stage_config: T2IStageConfig) -> None:
    loss = stage_config.loss
    assert (loss.temperature, loss.queue_size, loss.momentum) == (0.07, 2048, 0.999)
    assert (loss.positives, loss.queue_mask, loss.queue_init) == ("pair", "batch", "random_as_published")
    assert (loss.key_head, loss.key_start, loss.in_batch_negatives) == ("live", "redrawn", False)
    # Of the identity loss ours is the mean over both modalities, theirs the sum.
    assert (loss.contrastive_weight, loss.alignment_weight, loss.identity_weight) == (1, 1, 2)
    assert (loss.sdm_weight, loss.mlm_weight, loss.classifier, loss.label_smoothing) == (0, 0, "normalised", 0.1)
    defaults = {name: each.default for name, each in inspect.signature(alignment_loss).parameters.items()}
    assert (defaults["positive_bound"], defaults["negative_bound"]) == (0.6, 0.4)
    assert (defaults["positive_scale"], defaults["negative_scale"]) == (10, 40)


def test_sizes(config: RunConfig, stage_config: T2IStageConfig) -> None:
    model = config.model
    assert model.image_size == (384, 128) and model.last_stride == 1 and model.attention_pool == "redrawn"
    with torch.device("meta"):
        encoder = build_dual_encoder(model)
    assert isinstance(encoder.text, WordGRU) and encoder.features == 256
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    assert shapes["visual.attnpool.positional_embedding"][0] == 24 * 8 + 1
    assert shapes["text.words"] == (9408, 512) and not encoder.text.words.requires_grad
    assert shapes["text.projection.weight"] == (256, 1024) and encoder.text_shape.context_length == 105
    grus = [name for name in shapes if "_gru." in name]
    assert len(grus) == 4 and not any("bias" in name for name in grus)
    assert stage_config.data.identities == 11003


def test_batches_and_augmentation(config: RunConfig, stage_config: T2IStageConfig) -> None:
    data = stage_config.data
    assert (data.global_batch_size, data.sampler, data.images_per_identity, data.items) == (
        128,
        "identity",
        4,
        "captions",
    )
    augment = data.augment
    assert (augment.flip, augment.pad, augment.erase, augment.crop, augment.color) == (0.5, 10, 0.5, 1, 0)
    mean, std = config.model.image_mean, config.model.image_std
    # The published fill is the mean, put in after normalisation.
    assert augment.erase_fill == tuple(round(255 * (m + m * s)) for m, s in zip(mean, std, strict=True))


def test_adam_with_faster_biases_that_do_not_decay(config: RunConfig, stage_config: T2IStageConfig) -> None:
    optimizer = stage_config.optimizer
    assert (optimizer.name, optimizer.betas, optimizer.eps) == ("adam", (0.9, 0.999), 1e-8)
    assert stage_config.engine.max_grad_norm == 0 and stage_config.engine.precision == "fp32"
    loss = stage_config.loss.model_copy(update={"queue_size": 0})  # key encoders cannot be copied without memory
    with torch.device("meta"):
        plain = stage_config.model_copy(update={"loss": loss})
        stage = build_stage(plain, build_dual_encoder(config.model), Surroundings(128, identities=11003))
    for group in parameter_groups(stage.trainable(), optimizer):
        for name in group["names"]:
            expected = (2 * LR, 0.0) if "bias" in name else (LR, DECAY)
            assert (group["lr"], group["weight_decay"]) == pytest.approx(expected), name


def test_epochs_and_the_factor_in_each(stage_config: T2IStageConfig) -> None:
    epoch = 68126 // 128  # of all captions, see the head of the recipe
    assert stage_config.steps == 80 * epoch
    for step in range(0, stage_config.steps, 97):
        e = step // epoch
        expected = 0.1 + 0.9 * e / 5 if e < 5 else 0.1 ** ((e >= 40) + (e >= 70))
        assert lr_factor(stage_config.optimizer, step, stage_config.steps) == pytest.approx(expected), step


def test_re_ranking(stage_config: T2IStageConfig) -> None:
    rerank = stage_config.evaluation.rerank
    assert rerank is not None and (rerank.neighbours, rerank.weight) == (5, 0.05)
