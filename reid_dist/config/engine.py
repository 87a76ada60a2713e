"""Settings of the engine and the optimizer."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from reid_dist.config.section import Momentum, NotNegative, Positive, Section


class EngineConfig(Section):
    """What trains a stage, and how."""

    backend: Literal["deepspeed", "torch"] = Field("deepspeed", description="torch: DDP and FSDP2, without DeepSpeed")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="ranks share out 1: optimizer state, 2: and gradients, 3: and weights"
    )
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
    def _backend_can(self) -> "EngineConfig":
        if self.backend == "torch" and self.deepspeed:
            raise ValueError("deepspeed: raw keys are DeepSpeed's, and backend is torch; remove one of the two")
        if self.backend == "torch" and self.precision == "pure_bf16":
            raise ValueError("precision: pure_bf16 has no fp32 masters with backend torch; choose bf16 or fp32")
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


class OptimizerRule(Section):
    """Settings of the parameters whose names contain one of some words."""

    contains: list[str] = Field(min_length=1, description="parts of parameter names, `bias` or `classifier`")
    lr: Positive | None = Field(None, description="factor of optimizer.lr; none: as earlier rules say")
    weight_decay: NotNegative | None = Field(None, description="none: as earlier rules say")


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule; a step is an optimizer step."""

    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adam: weight decay as an L2 term of the loss")
    lr: Positive = 1e-5
    weight_decay: NotNegative = 0.02
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    eps: Positive = 1e-8
    momentum: NotNegative = Field(0.9, description="of sgd")
    new_lr_multiplier: Positive = Field(
        1.0,
        description="lr factor of what no pretrained weights exist for: heads, prompts, model.projection, words, GRU",
    )
    bias_lr_multiplier: Positive = Field(1.0, description="lr factor of biases")
    rules: list[OptimizerRule] = Field(
        default_factory=list,
        description="by name, later ones replace; with any, all parameters decay unless told",
    )
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear from warmup_start x lr")
    warmup_start: float = Field(0.1, ge=0, le=1)
    milestones: list[Annotated[int, Field(gt=0)]] = Field(
        default_factory=list, description="steps at which multistep multiplies by gamma"
    )
    gamma: Positive = 0.1
    schedule_every: int = Field(1, gt=0, description="steps for which the factor stays; an epoch's, as some publish")

    @model_validator(mode="after")
    def _one_way_to_group(self) -> "OptimizerConfig":
        both = [name for name in ("new_lr_multiplier", "bias_lr_multiplier") if getattr(self, name) != 1]
        if self.rules and both:
            raise ValueError(f"{', '.join(both)}: rules set every learning rate by name; remove one or the other")
        return self
