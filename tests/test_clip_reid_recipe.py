"""configs/clip_reid_vit_b16.yaml against the constants of the published vit_clipreid.yml and Market-1501."""

from pathlib import Path

import pytest

from reid_dist.config import I2IStageConfig, IdentityPromptStageConfig, RunConfig
from reid_dist.optim import lr_factor
from reid_dist.recipe_file import load_config

EPOCH = 12936 // 64  # training images in whole batches


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(Path(__file__).parents[1] / "configs" / "clip_reid_vit_b16.yaml")


def test_model_and_data(config: RunConfig) -> None:
    model = config.model
    assert (model.architecture, model.image_size) == ("ViT-B-16-quickgelu", (256, 128))
    assert model.image_mean == model.image_std == (0.5, 0.5, 0.5)
    for stage in config.stages:
        assert (stage.data.global_batch_size, stage.data.identities) == (64, 751)


def test_sentences_come_first(config: RunConfig) -> None:
    first = config.stages[0]
    assert isinstance(first, IdentityPromptStageConfig) and first.steps == 120 * EPOCH
    assert (first.loss.tokens, first.loss.template, first.loss.products) == (4, "a photo of a {} person.", "plain")
    assert (first.optimizer.name, first.optimizer.lr, first.optimizer.weight_decay) == ("adam", 3.5e-4, 1e-4)
    augment = first.data.augment
    assert (augment.flip, augment.pad, augment.erase) == (0, 0, 0)


def test_then_the_image_encoder(config: RunConfig) -> None:
    second = config.stages[1]
    assert isinstance(second, I2IStageConfig) and second.steps == 60 * EPOCH
    loss = second.loss
    assert (loss.identity_weight, loss.triplet_weight, loss.identity_text_weight) == (0.25, 1, 1)
    assert (loss.triplet_margin, loss.label_smoothing, loss.text_weight) == (0.3, 0.1, 0)
    assert (second.data.sampler, second.data.images_per_identity) == ("identity", 4)
    augment = second.data.augment
    assert (augment.flip, augment.pad, augment.erase) == (0.5, 10, 0.5)
    assert (second.optimizer.name, second.optimizer.lr, second.optimizer.weight_decay) == ("adam", 5e-6, 1e-4)


@pytest.mark.parametrize(
    ("stage", "epoch", "lr"),
    [(0, 5, 3.5e-4), (0, 119, 0.0), (1, 0, 0.19 * 5e-6), (1, 10, 5e-6), (1, 28, 5e-6), (1, 29, 5e-7), (1, 49, 5e-8)],
)
def test_learning_rates(config: RunConfig, stage: int, epoch: int, lr: float) -> None:
    settings = config.stages[stage]
    found = settings.optimizer.lr * lr_factor(settings.optimizer, epoch * EPOCH, settings.steps)
    assert found == pytest.approx(lr, rel=0.01, abs=1e-6 if stage == 0 else 0)
