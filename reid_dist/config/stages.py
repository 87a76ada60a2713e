"""Settings of the stages of a run, and of the run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from reid_dist.config.data import DataConfig
from reid_dist.config.engine import EngineConfig, OptimizerConfig
from reid_dist.config.losses import ContrastiveLoss, I2ILoss, IdentityPromptLoss, PretrainLoss, TextLoss
from reid_dist.config.model import ModelConfig
from reid_dist.config.run import CheckpointConfig, GuardConfig, SupervisionConfig
from reid_dist.config.section import Section

StageKind = Literal["pretrain", "prompt", "identity_prompt", "i2i", "t2i"]


class RerankConfig(Section):
    """TextReID's re-ranking: shared nearest neighbours add to the similarity (methods.md 3.7)."""

    neighbours: int = Field(5, gt=0)
    weight: float = Field(0.05, ge=0, le=1000)


class EvaluationConfig(Section):
    """Benchmarks scored after every stage."""

    t2i: list[str] = Field(default_factory=list, description="shard sets below data.root with captioned gallery images")
    i2i: list[str] = Field(default_factory=list, description="shard sets below data.root with query and gallery images")
    split: Literal["val", "test"] = "val"
    batch_size: int = Field(128, gt=0, description="samples per rank")
    rerank: RerankConfig | None = Field(None, description="rows of re-ranked t2i scores beside the plain ones")


class StageConfig(Section):
    """What every training stage has, with the shared sections filled in."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")
    kind: StageKind = Field(description="pretrain, prompt, identity_prompt, i2i or t2i; the name when absent")
    steps: int = Field(ge=0, description="optimizer steps; 0 hands the weights on untouched")
    freeze: list[Literal["visual", "text", "visual_trunk", "text_trunk"]] = Field(
        default_factory=list, description="towers that do not train; a trunk: all of one but its last linear map"
    )
    train_prompts: bool = Field(False, description="model.prompts train too; else only in a stage of kind prompt")
    data: DataConfig = DataConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "StageConfig":
        if self.steps and not self.data.train:
            raise ValueError("data.train is empty; name at least one shard set")
        if self.engine.precision == "pure_bf16" and self.engine.zero_stage == 0:
            raise ValueError(
                "engine.precision: pure_bf16 has fp32 masters only at zero_stage 1, 2 and 3; choose one, or bf16"
            )
        if self.kind != "pretrain" and self.data.reader == "stream":
            raise ValueError("data.reader: a stream knows no identities, which this stage needs; set reader=index")
        if self.kind in ("prompt", "identity_prompt") and (self.freeze or self.train_prompts):
            raise ValueError(f"freeze, train_prompts: what trains in a stage of kind {self.kind} is fixed; remove them")
        if self.kind == "i2i" and "visual" in self.freeze:
            raise ValueError("freeze: the i2i stage trains the vision encoder; remove 'visual'")
        queue = getattr(getattr(self, "loss", None), "queue_size", 0)
        if self.freeze and self.train_prompts and queue:
            raise ValueError(
                "train_prompts: a frozen tower's features are the queue's keys, through which its prompts cannot learn;"
                " remove freeze, train_prompts or loss.queue_size"
            )
        if set(self.freeze) >= {"visual", "text"} and not self.train_prompts:
            raise ValueError("freeze leaves nothing to train")
        return self


def _require_momentum_possible(loss: ContrastiveLoss, engine: EngineConfig) -> None:
    if loss.queue_size and engine.zero_stage == 3:
        raise ValueError(
            "engine.zero_stage: 3 is not proven with momentum encoders (loss.queue_size > 0); choose 0, 1 or 2"
        )


class PretrainStageConfig(StageConfig):
    """Generic image-text pretraining."""

    kind: Literal["pretrain"]
    loss: PretrainLoss = PretrainLoss()
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="share of an image's patches left out of a step; of ViTs")

    @model_validator(mode="after")
    def _possible(self) -> "PretrainStageConfig":
        if self.patch_dropout and {"visual", "visual_trunk"} & set(self.freeze):
            raise ValueError("patch_dropout: a frozen image tower sees all patches; remove one of the two")
        _require_momentum_possible(self.loss, self.engine)
        return self


class PromptStageConfig(StageConfig):
    """Prompts alone, both towers frozen (methods.md card 2, stage 1)."""

    kind: Literal["prompt"]
    loss: TextLoss = TextLoss()

    @model_validator(mode="after")
    def _possible(self) -> "PromptStageConfig":
        if self.loss.queue_size or self.loss.classifier in ("shared", "prototypes"):
            raise ValueError("loss: a prompt stage has no momentum encoders and no images' classifier; remove the keys")
        return self


class IdentityPromptStageConfig(StageConfig):
    """Learned sentences of identities, both towers frozen (CLIP-ReID, stage 1)."""

    kind: Literal["identity_prompt"]
    loss: IdentityPromptLoss = IdentityPromptLoss()


class I2IStageConfig(StageConfig):
    """Image-to-image stage; with text supervision also the joint stage."""

    kind: Literal["i2i"]
    loss: I2ILoss = I2ILoss()

    @model_validator(mode="after")
    def _possible(self) -> "I2IStageConfig":
        _require_momentum_possible(self.loss.text, self.engine)
        if self.loss.text.with_prototypes:
            raise ValueError("loss.text.classifier: prototypes need a frozen image tower; choose another classifier")
        if self.loss.conflict_every and self.data.mixing != "mixed":
            raise ValueError("loss.conflict_every: needs both tasks in every batch; set data.mixing to mixed")
        if self.freeze and self.train_prompts and self.loss.text.queue_size:
            raise ValueError("train_prompts: not with a frozen tower and a queue; remove one of the three")
        if self.loss.conflict_every and (self.engine.zero_stage == 3 or self.engine.cached_gradients):
            raise ValueError(
                "loss.conflict_every: needs whole weights and gradients of each loss; choose zero_stage 0, 1 or 2"
                " without cached_gradients"
            )
        return self


class T2IStageConfig(StageConfig):
    """Text-to-image stage."""

    kind: Literal["t2i"]
    loss: TextLoss = TextLoss()

    @model_validator(mode="after")
    def _possible(self) -> "T2IStageConfig":
        _require_momentum_possible(self.loss, self.engine)
        if self.loss.classifier == "shared":
            raise ValueError("loss.classifier: shared means with the i2i stage's; choose linear, normalised or neck")
        if self.loss.with_prototypes and ("visual" not in self.freeze or self.train_prompts):
            raise ValueError(
                "loss.classifier: prototypes are of image features that stay as they are; set freeze=[visual] without"
                " train_prompts, or choose linear, normalised or neck"
            )
        return self


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "pretrain": PretrainStageConfig,
    "prompt": PromptStageConfig,
    "identity_prompt": IdentityPromptStageConfig,
    "i2i": I2IStageConfig,
    "t2i": T2IStageConfig,
}
AnyStageConfig = Annotated[
    PretrainStageConfig | PromptStageConfig | IdentityPromptStageConfig | I2IStageConfig | T2IStageConfig,
    Field(discriminator="kind"),
]


class RunConfig(Section):
    """A whole run."""

    output_dir: Path = Path("runs/run")
    seed: int = Field(0, ge=0, lt=2**31)
    max_steps: int | None = Field(None, gt=0, description="cap on the steps of every stage")
    log_every: int = Field(20, gt=0, description="steps between lines and TensorBoard points")
    ledger: bool = Field(False, description="each rank appends what it trained on, step by step: sample by sample")
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    model: ModelConfig
    stages: list[AnyStageConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> "RunConfig":
        names = [stage.name for stage in self.stages]
        if set(names) & {"start", "tensorboard"}:
            raise ValueError("stages: `start` and `tensorboard` are folders of the run; give the stage another name")
        if len(set(names)) < len(names):
            raise ValueError(
                f"stages: two stages share a name ({', '.join(names)}); give one another `name` and its `kind`"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit_the_model_and_each_other(self) -> "RunConfig":
        before: AnyStageConfig | None = None
        for stage in self.stages:
            trains_prompts = stage.steps > 0 and (stage.kind == "prompt" or stage.train_prompts)
            if trains_prompts and self.model.prompts is None:
                raise ValueError(f"stages.{stage.name}: there are no prompts to train; set model.prompts")
            with_sentences = isinstance(stage, I2IStageConfig) and stage.loss.identity_text_weight > 0
            learned = isinstance(before, IdentityPromptStageConfig) and before.data.train == stage.data.train
            learned = learned and before is not None and before.steps > 0
            if with_sentences and not learned:
                raise ValueError(
                    f"stages.{stage.name}: loss.identity_text_weight needs a stage of kind identity_prompt on the same"
                    " data.train directly before it"
                )
            before = stage
        return self

    def stage_steps(self, stage: StageConfig) -> int:
        """Optimizer steps of a stage after the cap."""
        return stage.steps if self.max_steps is None else min(stage.steps, self.max_steps)
