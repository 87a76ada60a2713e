"""Every setting of a run: pydantic models, YAML, dotted overrides, all problems reported at once.

A recipe is one flat YAML file. Its top-level `data`, `engine`, `optimizer` and `evaluation` are the defaults of every
stage; `stages.<name>.…` overrides them, in the file and on the command line: `defaults < YAML < key.sub=value`.
"""

import difflib
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reid_dist.errors import UserError

SHARED_SECTIONS = ("data", "engine", "optimizer", "evaluation")
StageKind = Literal["pretrain", "i2i", "t2i"]
Positive = Annotated[float, Field(gt=0)]
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


class DataConfig(Section):
    """Training data of a stage and how it is batched."""

    root: Path = Field(Path("data/shards"), description="folder of shard sets")
    train: list[str] = Field(default_factory=list, description="shard sets below root whose training split is used")
    global_batch_size: int = Field(64, gt=0, description="samples per optimizer step over all ranks and accumulation")
    sampler: Literal["epoch", "identity"] = Field("epoch", description="shuffled samples, or P identities x K images")
    images_per_identity: int = Field(
        4, gt=0, description="K of sampler=identity; P = global_batch_size / accumulation / K"
    )
    identities: int | None = Field(None, gt=0, description="training identities, for --dry-run without the data")
    exclude: str | None = Field(None, description="file below root: identities that are never trained on, one a line")
    workers: int = Field(0, ge=0, description="loading processes per rank; 0: in the training process")
    cache: bool = Field(
        False, description="keep decoded, resized images in memory (bytes: samples x 3 x height x width)"
    )
    augment: AugmentConfig = AugmentConfig()


class EngineConfig(Section):
    """DeepSpeed."""

    backend: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "pure_bf16"] = Field(
        "fp32", description="bf16: autocast over fp32 weights; pure_bf16: bf16 weights, fp32 masters"
    )
    gradient_accumulation_steps: int = Field(1, gt=0)
    max_grad_norm: NotNegative = Field(0.0, description="global L2 norm; 0: no clipping")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="raw DeepSpeed keys, merged over the derived ones"
    )

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
    betas: tuple[float, float] = (0.9, 0.98)
    eps: Positive = 1e-8
    momentum: NotNegative = Field(0.9, description="of sgd")
    new_lr_multiplier: Positive = Field(1.0, description="lr factor of layers without pretrained weights")
    bias_lr_multiplier: Positive = Field(1.0, description="lr factor of biases")
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear from warmup_start x lr")
    warmup_start: float = Field(0.1, ge=0, le=1)
    milestones: list[int] = Field(default_factory=list, description="steps at which multistep multiplies by gamma")
    gamma: Positive = 0.1


class EvaluationConfig(Section):
    """Benchmarks scored after every stage."""

    t2i: list[str] = Field(default_factory=list, description="shard sets below data.root with captioned gallery images")
    i2i: list[str] = Field(default_factory=list, description="shard sets below data.root with query and gallery images")
    split: Literal["val", "test"] = "val"
    batch_size: int = Field(128, gt=0, description="samples per rank")


class PretrainLoss(Section):
    """Image-text contrastive loss of generic pairs: no settings."""


class I2ILoss(Section):
    """Losses of the image-to-image stage."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    identity_weight: NotNegative = 1.0
    triplet_weight: NotNegative = 1.0
    triplet_margin: NotNegative = 0.3
    text_weight: NotNegative = Field(
        0.0, description="weight of a contrastive loss with the captions; 0: no text supervision"
    )


class T2ILoss(Section):
    """Losses of the text-to-image stage."""

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
        if self.kind == "i2i" and "visual" in self.freeze:
            raise ValueError("freeze: the i2i stage trains the vision encoder; remove 'visual'")
        if set(self.freeze) == {"visual", "text"}:
            raise ValueError("freeze leaves nothing to train")
        return self


class PretrainStageConfig(StageConfig):
    """Generic image-text pretraining."""

    kind: Literal["pretrain"]
    loss: PretrainLoss = PretrainLoss()


class I2IStageConfig(StageConfig):
    """Image-to-image stage."""

    kind: Literal["i2i"]
    loss: I2ILoss = I2ILoss()


class T2IStageConfig(StageConfig):
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
    seed: int = Field(0, ge=0)
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


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies `key.sub=value` overrides.

    Raises:
        UserError: every problem found, one a line, each naming the file and the key.
    """
    raw = _read_yaml(path)
    for text in overrides:
        _apply_override(raw, text, path)
    problems = [*_unknown_keys(raw, path), *_unseen_defaults(raw, path)]
    try:
        config = RunConfig.model_validate(_with_stage_defaults(raw))
    except ValidationError as error:
        # What is told already, with the nearest name, is not told again.
        told = ("extra_forbidden", "union_tag_invalid") if problems else ()
        problems += _messages(error, raw, path, told)
    if problems:
        raise UserError("\n".join(problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                continue  # the parent class tells
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, such as `model:` and `stages:`")
    return raw


def _apply_override(raw: dict[str, Any], text: str, path: Path) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} on the command line: overrides have the form key.sub=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r} on the command line: the value is not valid YAML") from error
    parts = key.split(".")
    target: Any = raw
    if parts[0] == "stages" and len(parts) > 2:
        target = _stage_of(raw, parts[1], path)
        parts = parts[2:]
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"{text!r} on the command line: {part} is not a section of {path}")
    target[parts[-1]] = parsed


def _stage_of(raw: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    stages = [stage for stage in raw.get("stages") or [] if isinstance(stage, dict)]
    for stage in stages:
        if stage.get("name") == name:
            return stage
    raise UserError(
        f"stages.{name}: {path} has no stage {name!r}{_nearest(name, [str(s.get('name')) for s in stages])}"
    )


def _with_stage_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Moves the shared top-level sections into every stage, below the stage's own values."""
    run = {key: value for key, value in raw.items() if key not in SHARED_SECTIONS}
    if not isinstance(run.get("stages"), list):
        return run
    run["stages"] = [
        _complete_stage(stage, {key: raw[key] for key in SHARED_SECTIONS if key in raw})
        if isinstance(stage, dict)
        else stage
        for stage in run["stages"]
    ]
    return run


def _complete_stage(stage: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    stage = merge(defaults, stage)
    stage.setdefault("kind", stage.get("name"))
    return stage


def merge(base: Any, over: Any) -> Any:
    """Nested mappings laid over each other key by key; any other value of `over` replaces that of `base`."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in over.items()}
    return over


def _unknown_keys(raw: dict[str, Any], path: Path) -> Iterator[str]:
    """One line for each key that no section knows, with the nearest name that exists."""
    top = {**_fields(RunConfig), **{key: _fields(StageConfig)[key] for key in SHARED_SECTIONS}}
    stages = raw.get("stages")
    yield from _unknown_below({k: v for k, v in raw.items() if k != "stages"}, top, "", path)
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict):
            kind = str(stage.get("kind", stage.get("name")))
            if kind not in STAGE_CONFIGS:
                yield f"{path}: stages: unknown stage {kind!r}{_nearest(kind, list(STAGE_CONFIGS))}"
                continue
            known = _fields(STAGE_CONFIGS[kind])
            yield from _unknown_below(stage, known, f"stages.{stage.get('name')}.", path)


def _unseen_defaults(raw: dict[str, Any], path: Path) -> Iterator[str]:
    """One line for each wrong top-level default that validation cannot see, because every stage has its own."""
    stages = raw.get("stages")
    own = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    for key in SHARED_SECTIONS:
        if key in raw and not isinstance(raw[key], dict) and all(key in stage for stage in own):
            yield f"{path}: {key}: should be a mapping of keys, not {raw[key]!r}"


def _unknown_below(raw: dict[str, Any], known: dict[str, Any], prefix: str, path: Path) -> Iterator[str]:
    for key, value in raw.items():
        if key not in known:
            yield f"{path}: unknown key {prefix}{key}{_nearest(str(key), list(known))}"
        elif isinstance(value, dict) and isinstance(known[key], type) and issubclass(known[key], BaseModel):
            yield from _unknown_below(value, _fields(known[key]), f"{prefix}{key}.", path)


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    """Field name -> its annotation with `| None` removed."""
    return {name: _not_none(field.annotation) for name, field in section.model_fields.items()}


def _not_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return options[0] if len(options) == 1 else annotation
    return annotation


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def _messages(error: ValidationError, raw: dict[str, Any], path: Path, told: Sequence[str]) -> Iterator[str]:
    """One line for each problem not of a `told` type; a key that only the top level holds is named there, once."""
    seen = set()
    for problem in error.errors():
        if problem["type"] in told:
            continue
        key = _dotted(problem["loc"], raw)
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "literal_error" and isinstance(problem["input"], str):
            options = [option.strip("' ") for option in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            reason += _nearest(problem["input"], options)
        shown = f", not {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
        line = f"{path}: {key}: {reason}{shown}"
        if line not in seen:
            seen.add(line)
            yield line


def _dotted(location: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    parts = list(location)
    if len(parts) >= 2 and parts[0] == "stages" and isinstance(parts[1], int):
        stage = raw["stages"][parts[1]]
        rest = parts[3:]  # parts[2] is the kind, by which pydantic chose among the stage classes
        own = isinstance(stage, dict) and bool(rest) and _holds(stage, rest)
        if rest and not own and rest[0] in SHARED_SECTIONS and _holds(raw, rest):
            return ".".join(str(part) for part in rest)
        name = stage.get("name", parts[1]) if isinstance(stage, dict) else parts[1]
        parts = ["stages", name, *rest]
    return ".".join(str(part) for part in parts)


def _holds(raw: Any, keys: Sequence[int | str]) -> bool:
    for key in keys:
        if not isinstance(raw, dict) or key not in raw:
            return False
        raw = raw[key]
    return True
