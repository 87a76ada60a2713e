"""The training stages of a recipe."""

from collections.abc import Callable

from reid_dist.config import I2IStageConfig, StageConfig, T2IStageConfig
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import Batch, Stage, StageOutput
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage

__all__ = ["STAGES", "Batch", "Stage", "StageOutput", "build_stage"]


def _pretrain(config: StageConfig, encoder: DualEncoder, identities: int) -> Stage:
    return PretrainStage(encoder, config.freeze)


def _i2i(config: StageConfig, encoder: DualEncoder, identities: int) -> Stage:
    assert isinstance(config, I2IStageConfig)
    return I2IStage(encoder, encoder.features, identities, config.loss, tuple(config.freeze))


def _t2i(config: StageConfig, encoder: DualEncoder, identities: int) -> Stage:
    assert isinstance(config, T2IStageConfig)
    return T2IStage(encoder, config.loss, tuple(config.freeze))


STAGES: dict[str, Callable[[StageConfig, DualEncoder, int], Stage]] = {"pretrain": _pretrain, "i2i": _i2i, "t2i": _t2i}


def build_stage(config: StageConfig, encoder: DualEncoder, identities: int) -> Stage:
    """The stage that a configuration asks for.

    Args:
        config: one entry of `stages:`.
        encoder: the weights it starts from; trained in place.
        identities: training identities, the size of an identity classifier.
    """
    return STAGES[config.kind](config, encoder, identities)
