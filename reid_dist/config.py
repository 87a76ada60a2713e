"""Every setting of a run: the pydantic models that a recipe fills in.

A recipe is one flat YAML file, read by `recipe_file.py`. Its top-level `data`, `engine`, `optimizer` and `evaluation`
are the defaults of every stage; `stages.<name>.…` overrides them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

StageKind = Literal["pretrain", "i2i", "t2i"]
Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Pixels = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The dual encoder."""

    architecture: str = Field(description="open_clip name, or path of a .json file of the same form")
    weights: str | None = Field(None, description="weights file, exported stage folder, or open_clip:TAG; none: random")
    image_size: tuple[Pixels, Pixels] = Field((384, 128), description="height, width in pixels")
    patch_stride: int | None = Field(None, description="pixels; less than the patch size: overlapping ViT patches")
    position_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    gradient_checkpointing: bool = False
    image_mean: tuple[float, float, float] = Field((0.48145466, 0.4578275, 0.40821073), description="of 0..1 images")
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    vocabulary: Path | None = Field(None, description="word list, one a line; none: the architecture's own tokenizer")
    sync_batch_norm: bool = Field(False, description="GPUs only: BatchNorm towers normalise over all ranks")


class AugmentConfig(Section):
    """Augmentation of training images, per image on uint8."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    pad: int = Field(0, ge=0, description="pixels of padding before a random crop back to size")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a random rectangle")
    jitter: float = Field(0.0, ge=0, lt=1, description="largest relative change of each channel's gain")
    color: float = Field(0.0, ge=0, lt=1, description="largest relative change of brightness, contrast and saturation")
    crop: float = Field(1.0, gt=0, le=1, description="least share of the area of a random resized crop; 1: none")
    rand_ops: int = Field(0, ge=0, le=8, description="RandAugment: operations per image")
    rand_magnitude: float = Field(0.3, ge=0, le=1, description="RandAugment: strength of each operation")


class StreamConfig(Section):
    """How `reader: stream` goes through its tars."""

    resampled: bool = Field(False, description="tars drawn with replacement; false: pass after pass over all of them")
    shuffle_buffer: int = Field(1000, gt=0, description="samples that each worker holds and mixes")


class DataConfig(Section):
    """Training data of a stage and how it is batched."""

    root: str = Field("data/shards", description="folder, or https, http or s3 address, of shard sets")
    train: list[str] = Field(
        default_factory=list,
        description="shard sets below root, or with a path or address of their own, whose training split is used; "
        "with reader=stream also tars by pattern, cc3m/{00000..00331}.tar",
    )
    weights: list[Positive] = Field(
        default_factory=list, description="share of each set of `train` in every batch; none: by their sizes"
    )
    reader: Literal["index", "stream"] = Field(
        "index", description="index: any sample at any time, exact epochs; stream: tars from beginning to end"
    )
    stream: StreamConfig = StreamConfig()
    global_batch_size: int = Field(64, gt=0, description="samples per optimizer step over all ranks and accumulation")
    sampler: Literal["epoch", "identity"] = Field("epoch", description="shuffled samples, or P identities x K images")
    images_per_identity: int = Field(
        4, gt=0, description="K of sampler=identity; P = global_batch_size / accumulation / K"
    )
    identities: int | None = Field(None, gt=0, description="training identities, for --dry-run without the data")
    exclude: str | None = Field(None, description="file below root: identities and images never trained on, one a line")
    allow_overlap: bool = Field(
        False, description="train although images of the evaluation sets are among the training's"
    )
    max_bad_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of unreadable samples that are counted and replaced; 0: stop at the first"
    )
    workers: int = Field(0, ge=0, description="loading processes per rank; 0: in the training process")
    cache: bool = Field(
        False,
        description="reader=index: keep decoded, resized images in memory (bytes: samples x 3 x height x width)",
    )
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(f"weights: {len(self.weights)} numbers for {len(self.train)} sets; give one for each")
        if self.reader == "stream" and self.sampler == "identity":
            raise ValueError("sampler: identity needs reader=index; a stream knows no identities")
        return self

    def location(self, name: str) -> str:
        """Where a set is: its own path or address, or the one below `root`."""
        if name.startswith("/") or "://" in name:
            return name
        if "://" not in self.root:
            return f"{self.root.rstrip('/')}/{name}"
        root = urlsplit(self.root)  # what follows the path, the token of a signed address, stays behind it
        return urlunsplit(root._replace(path=f"{root.path.rstrip('/')}/{name}"))


class EngineConfig(Section):
    """DeepSpeed."""

    backend: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "pure_bf16"] = Field(
        "fp32", description="bf16: autocast over fp32 weights; pure_bf16: bf16 weights, fp32 masters"
    )
    gradient_accumulation_steps: int = Field(1, gt=0)
    cached_gradients: bool = Field(
        False, description="accumulation keeps all negatives of the step: each micro-batch is run twice (GradCache)"
    )
    max_grad_norm: NotNegative = Field(0.0, description="global L2 norm; 0: no clipping")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="raw DeepSpeed keys, merged over the derived ones"
    )

    @model_validator(mode="after")
    def _cached_gradients_possible(self) -> "EngineConfig":
        if self.cached_gradients and self.gradient_accumulation_steps == 1:
            raise ValueError(
                "cached_gradients: gradient_accumulation_steps is 1, whose batch has all negatives; raise it or remove"
                " the key"
            )
        if self.cached_gradients and self.zero_stage == 3:
            raise ValueError("cached_gradients: needs whole weights between forwards; choose zero_stage 0, 1 or 2")
        return self

    @model_validator(mode="after")
    def _no_second_truth(self) -> "EngineConfig":
        derived = {
            "train_batch_size": "data.global_batch_size",
            "train_micro_batch_size_per_gpu": "data.global_batch_size",
            "gradient_accumulation_steps": "engine.gradient_accumulation_steps",
            "gradient_clipping": "engine.max_grad_norm",
            "bf16": "engine.precision",
            "fp16": "engine.precision",
            "torch_autocast": "engine.precision",
            "optimizer": "optimizer",
            "scheduler": "optimizer.schedule",
        }
        for key in sorted(set(derived) & set(self.deepspeed)):
            raise ValueError(f"deepspeed.{key} is derived from {derived[key]}; set that instead")
        if "stage" in (self.deepspeed.get("zero_optimization") or {}):
            raise ValueError("deepspeed.zero_optimization.stage is derived from engine.zero_stage; set that instead")
        return self


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule; a step is an optimizer step."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-5
    weight_decay: NotNegative = 0.02
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    eps: Positive = 1e-8
    momentum: NotNegative = Field(0.9, description="of sgd")
    new_lr_multiplier: Positive = Field(1.0, description="lr factor of layers without pretrained weights")
    bias_lr_multiplier: Positive = Field(1.0, description="lr factor of biases")
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear from warmup_start x lr")
    warmup_start: float = Field(0.1, ge=0, le=1)
    milestones: list[Annotated[int, Field(gt=0)]] = Field(
        default_factory=list, description="steps at which multistep multiplies by gamma"
    )
    gamma: Positive = 0.1


class EvaluationConfig(Section):
    """Benchmarks scored after every stage."""

    t2i: list[str] = Field(default_factory=list, description="shard sets below data.root with captioned gallery images")
    i2i: list[str] = Field(default_factory=list, description="shard sets below data.root with query and gallery images")
    split: Literal["val", "test"] = "val"
    batch_size: int = Field(128, gt=0, description="samples per rank")


class ContrastiveLoss(Section):
    """Image-text contrastive loss within the global batch, or against a queue of momentum keys (CM-MoCo)."""

    temperature: Positive | None = Field(
        None, description="fixed divisor of the cosine, as published 0.07; none: learned, from the weights' own"
    )
    queue_size: int = Field(
        0, ge=0, lt=2**31, description="latest keys of each modality over all ranks; 0: the global batch, no queue"
    )
    queue_init: Literal["empty", "random_as_published"] = Field(
        "empty", description="empty: no negatives before the first keys; random: parallel vectors that count"
    )
    queue_mask: Literal["identity", "batch"] = Field(
        "identity", description="keys that are no negatives: those of the anchor's identity, or of any in the step"
    )
    queue_sharded: bool = Field(False, description="each rank holds a share, for queues beyond a few GB")
    queue_check_every: int = Field(100, ge=0, description="steps between checks that the ranks' queues agree; 0: none")
    in_batch_negatives: bool = Field(False, description="the current keys of all ranks are negatives too")
    momentum: Momentum = Field(0.999, description="of the key encoders: share of their weights that a step keeps")
    key_head: Literal["momentum", "live"] = Field(
        "momentum", description="last projection of the key encoders: averaged, or the current one as TextReID ships"
    )

    @model_validator(mode="after")
    def _queue_settings_have_a_queue(self) -> "ContrastiveLoss":
        idle = [
            name
            for name, field in type(self).model_fields.items()
            if name.startswith(("queue_", "in_batch")) and name != "queue_size" and getattr(self, name) != field.default
        ]
        if idle and not self.queue_size:
            raise ValueError(f"{', '.join(idle)}: without a queue (queue_size: 0); set queue_size, or remove them")
        if self.in_batch_negatives and self.queue_mask == "batch":
            raise ValueError(
                "queue_mask: batch leaves out all keys of the step, in_batch_negatives adds them; choose identity"
            )
        return self


class PretrainLoss(ContrastiveLoss):
    """Loss of generic pairs: the own pair is the only positive."""


class I2ILoss(Section):
    """Losses of the image-to-image stage."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    identity_weight: NotNegative = 1.0
    triplet_weight: NotNegative = 1.0
    triplet_margin: NotNegative = 0.3
    text_weight: NotNegative = Field(
        0.0, description="weight of a contrastive loss with the captions; 0: no text supervision"
    )


class T2ILoss(ContrastiveLoss):
    """Loss of the text-to-image stage."""

    positives: Literal["identity", "pair"] = Field(
        "identity", description="all pairs of one identity, or the own pair only"
    )


class StageConfig(Section):
    """What every training stage has, with the shared sections filled in."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")
    kind: StageKind = Field(description="pretrain, i2i or t2i; the name when absent")
    steps: int = Field(ge=0, description="optimizer steps; 0 hands the weights on untouched")
    freeze: list[Literal["visual", "text"]] = Field(default_factory=list, description="towers that do not train")
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
        if self.kind == "i2i" and "visual" in self.freeze:
            raise ValueError("freeze: the i2i stage trains the vision encoder; remove 'visual'")
        if set(self.freeze) == {"visual", "text"}:
            raise ValueError("freeze leaves nothing to train")
        return self


class ContrastiveStageConfig(StageConfig):
    """What the stages with a contrastive loss share."""

    loss: ContrastiveLoss = ContrastiveLoss()

    @model_validator(mode="after")
    def _momentum_possible(self) -> "ContrastiveStageConfig":
        if self.loss.queue_size and self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage: 3 is not proven with momentum encoders (loss.queue_size > 0); choose 0, 1 or 2"
            )
        return self


class PretrainStageConfig(ContrastiveStageConfig):
    """Generic image-text pretraining."""

    kind: Literal["pretrain"]
    loss: PretrainLoss = PretrainLoss()


class I2IStageConfig(StageConfig):
    """Image-to-image stage."""

    kind: Literal["i2i"]
    loss: I2ILoss = I2ILoss()


class T2IStageConfig(ContrastiveStageConfig):
    """Text-to-image stage."""

    kind: Literal["t2i"]
    loss: T2ILoss = T2ILoss()


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "pretrain": PretrainStageConfig,
    "i2i": I2IStageConfig,
    "t2i": T2IStageConfig,
}
AnyStageConfig = Annotated[PretrainStageConfig | I2IStageConfig | T2IStageConfig, Field(discriminator="kind")]


class RunConfig(Section):
    """A whole run."""

    output_dir: Path = Path("runs/run")
    seed: int = Field(0, ge=0, lt=2**31)
    max_steps: int | None = Field(None, gt=0, description="cap on the steps of every stage")
    log_every: int = Field(20, gt=0, description="steps between lines and TensorBoard points")
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

    def stage_steps(self, stage: StageConfig) -> int:
        """Optimizer steps of a stage after the cap."""
        return stage.steps if self.max_steps is None else min(stage.steps, self.max_steps)
