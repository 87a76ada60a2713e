"""The training stages of a recipe."""

from collections.abc import Callable

import torch

from reid_dist.config import I2IStageConfig, PretrainStageConfig, StageConfig, T2IStageConfig
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import Batch, Placement, Stage, StageOutput
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage

__all__ = ["STAGES", "Batch", "Stage", "StageOutput", "build_stage"]


def _pretrain(config: StageConfig, encoder: DualEncoder, identities: int, place: Placement) -> Stage:
    assert isinstance(config, PretrainStageConfig)
    return PretrainStage(encoder, config.loss, config.freeze, place)


def _i2i(config: StageConfig, encoder: DualEncoder, identities: int, place: Placement) -> Stage:
    assert isinstance(config, I2IStageConfig)
    return I2IStage(encoder, encoder.features, identities, config.loss, tuple(config.freeze))


def _t2i(config: StageConfig, encoder: DualEncoder, identities: int, place: Placement) -> Stage:
    assert isinstance(config, T2IStageConfig)
    return T2IStage(encoder, config.loss, config.freeze, place)


STAGES: dict[str, Callable[[StageConfig, DualEncoder, int, Placement], Stage]] = {
    "pretrain": _pretrain,
    "i2i": _i2i,
    "t2i": _t2i,
}


def build_stage(
    config: StageConfig,
    encoder: DualEncoder,
    identities: int,
    rows: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Stage:
    """The stage that a configuration asks for.

    Args:
        config: one entry of `stages:`.
        encoder: the weights it starts from; trained in place.
        identities: training identities, the size of an identity classifier.
        rows: samples of one rank and micro-step.
        device: where the stage will train.
        seed: of random keys, the same on all ranks.

    Raises:
        UserError: settings that this encoder cannot follow.
    """
    return STAGES[config.kind](config, encoder, identities, Placement(rows, device, config.engine.precision, seed))
