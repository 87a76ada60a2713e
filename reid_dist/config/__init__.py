"""Every setting of a run: the pydantic models that a recipe fills in.

A recipe is one flat YAML file, read by `recipe_file.py`. Its top-level `data`, `engine`, `optimizer` and `evaluation`
are the defaults of every stage; `stages.<name>.…` overrides them.
"""

from reid_dist.config.data import AugmentConfig, DataConfig, StreamConfig
from reid_dist.config.engine import EngineConfig, OptimizerConfig, OptimizerRule
from reid_dist.config.losses import ContrastiveLoss, I2ILoss, IdentityPromptLoss, PretrainLoss, TextLoss
from reid_dist.config.model import ModelConfig, PromptConfig, WordGruConfig
from reid_dist.config.run import CheckpointConfig, GuardConfig, SupervisionConfig
from reid_dist.config.section import Section
from reid_dist.config.stages import (
    STAGE_CONFIGS,
    EvaluationConfig,
    I2IStageConfig,
    IdentityPromptStageConfig,
    PretrainStageConfig,
    PromptStageConfig,
    RerankConfig,
    RunConfig,
    StageConfig,
    T2IStageConfig,
)

__all__ = [
    "STAGE_CONFIGS",
    "AugmentConfig",
    "CheckpointConfig",
    "ContrastiveLoss",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "I2ILoss",
    "I2IStageConfig",
    "IdentityPromptLoss",
    "IdentityPromptStageConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerRule",
    "PretrainLoss",
    "PretrainStageConfig",
    "PromptConfig",
    "PromptStageConfig",
    "RerankConfig",
    "RunConfig",
    "Section",
    "StageConfig",
    "StreamConfig",
    "SupervisionConfig",
    "T2IStageConfig",
    "TextLoss",
    "WordGruConfig",
]
