"""The training stages of a recipe."""

from collections.abc import Callable
from dataclasses import replace

from reid_dist.config import (
    I2IStageConfig,
    IdentityPromptStageConfig,
    PretrainStageConfig,
    PromptStageConfig,
    StageConfig,
    T2IStageConfig,
)
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Batch, StageOutput, Surroundings
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.identity_prompt import IdentityPromptStage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.prompt import PromptStage
from reid_dist.stages.t2i import T2IStage

__all__ = ["STAGES", "Batch", "Stage", "StageOutput", "Surroundings", "build_stage"]


def _pretrain(config: StageConfig, encoder: DualEncoder, run: Surroundings) -> Stage:
    assert isinstance(config, PretrainStageConfig)
    return PretrainStage(encoder, config.loss, config.freeze, run, config.train_prompts, config.patch_dropout)


def _prompt(config: StageConfig, encoder: DualEncoder, run: Surroundings) -> Stage:
    assert isinstance(config, PromptStageConfig)
    return PromptStage(encoder, config.loss, run)


def _identity_prompt(config: StageConfig, encoder: DualEncoder, run: Surroundings) -> Stage:
    assert isinstance(config, IdentityPromptStageConfig)
    return IdentityPromptStage(encoder, config.loss, run)


def _i2i(config: StageConfig, encoder: DualEncoder, run: Surroundings) -> Stage:
    assert isinstance(config, I2IStageConfig)
    return I2IStage(encoder, config.loss, config.freeze, run, config.train_prompts)


def _t2i(config: StageConfig, encoder: DualEncoder, run: Surroundings) -> Stage:
    assert isinstance(config, T2IStageConfig)
    return T2IStage(encoder, config.loss, config.freeze, run, config.train_prompts)


STAGES: dict[str, Callable[[StageConfig, DualEncoder, Surroundings], Stage]] = {
    "pretrain": _pretrain,
    "prompt": _prompt,
    "identity_prompt": _identity_prompt,
    "i2i": _i2i,
    "t2i": _t2i,
}


def build_stage(config: StageConfig, encoder: DualEncoder, run: Surroundings) -> Stage:
    """The stage that a configuration asks for.

    Args:
        config: one entry of `stages:`.
        encoder: the weights it starts from; trained in place.
        run: what else it must know.

    Raises:
        UserError: settings that this encoder cannot follow.
    """
    run = replace(run, optimizer=config.optimizer, max_grad_norm=config.engine.max_grad_norm)
    return STAGES[config.kind](config, encoder, run)
