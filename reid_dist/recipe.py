"""The stages of one run, in order: train, export, evaluate; finished ones are skipped."""

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reid_dist import distributed
from reid_dist.checkpoint import fingerprint, read_export, save_export, write_json
from reid_dist.config import I2IStageConfig, ModelConfig, RunConfig, StageConfig, dump_config
from reid_dist.data.cache import ImageCache
from reid_dist.data.exclude import read_exclusions
from reid_dist.data.loader import Sampling, TrainLoader
from reid_dist.data.reader import ShardSet
from reid_dist.data.sampler import local_batch_size
from reid_dist.data.tokenizer import Tokenizer, WordTokenizer, build_tokenizer
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.engine import Engine, prepare_environment
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import evaluate_benchmark
from reid_dist.metrics import StageLog, say, write_scalars
from reid_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from reid_dist.models.weights import load_weights
from reid_dist.stages import build_stage
from reid_dist.trainer import train

START = "start"  # the evaluation of the weights that the first stage gets


@dataclass
class Inputs:
    """Everything that a run reads, opened and checked before a device or a process group is touched."""

    shards: dict[Path, ShardSet]
    tokenizer: Tokenizer
    exclusions: dict[Path, frozenset[str]]
    cache: ImageCache = field(default_factory=ImageCache)


def open_inputs(config: RunConfig, world_size: int) -> Inputs:
    """Opens every shard set and the tokenizer, and checks that the batches can be shared by the ranks.

    Raises:
        UserError: the first thing that is missing or does not fit.
    """
    for stage in config.stages:
        check_batch(stage, world_size)
    shape = build_encoder(config.model, seed=None).text_shape
    tokenizer = build_tokenizer(
        config.model.vocabulary, config.model.architecture, shape.context_length, shape.vocab_size
    )
    paths = {path for stage in config.stages for path in stage_paths(stage)}
    lists = {stage.data.root / stage.data.exclude for stage in config.stages if stage.data.exclude}
    return Inputs(
        {path: ShardSet(path) for path in sorted(paths)},
        tokenizer,
        {path: read_exclusions(path) for path in sorted(lists)},
    )


def stage_paths(stage: StageConfig) -> list[Path]:
    """Every shard set that a stage trains on or is scored on."""
    names = [*stage.data.train, *stage.evaluation.t2i, *stage.evaluation.i2i]
    return [stage.data.root / name for name in names]


def check_batch(stage: StageConfig, world_size: int) -> int:
    """Samples per rank and accumulation step.

    Raises:
        UserError: the world size or the accumulation does not divide the global batch.
    """
    images = stage.data.images_per_identity if stage.data.sampler == "identity" else 1
    try:
        return local_batch_size(
            stage.data.global_batch_size, world_size, stage.engine.gradient_accumulation_steps, images
        )
    except UserError as error:
        raise UserError(f"stages.{stage.name}: {error}") from error


def build_encoder(model: ModelConfig, seed: int | None) -> DualEncoder:
    """The encoder with random weights by seed, or (None) only its shape, on no device."""
    arguments = (model.architecture, model.image_size, model.patch_stride, model.image_mean, model.image_std)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.device("meta") if seed is None else contextlib.nullcontext():
        encoder = build_dual_encoder(*arguments)
    encoder.set_grad_checkpointing(model.gradient_checkpointing)
    return encoder


def run(config: RunConfig) -> None:
    """Runs a recipe on the ranks that the launcher started; every rank calls it.

    Raises:
        UserError: wrong input, before any training where it can be known.
    """
    inputs = open_inputs(config, distributed.environment_world_size())
    fingerprints = _fingerprints(config, inputs)
    completed = _completed(config, fingerprints)
    device = prepare_environment()
    distributed.initialize(device)
    if distributed.rank() == 0:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / "config.yaml").write_text(dump_config(config))
    distributed.barrier()
    weights = config.model.weights
    _evaluate_start(config, inputs, device)
    for index, stage in enumerate(config.stages):
        folder = config.output_dir / stage.name
        if stage.name in completed:
            say(f"{stage.name}: complete in {folder}, skipped")
        else:
            _run_stage(config, index, fingerprints[index], weights, inputs, device)
        weights = str(folder / "export")


def _fingerprints(config: RunConfig, inputs: Inputs) -> list[str]:
    """What decides the weights of each stage, all stages before it included."""
    words = inputs.tokenizer.words if isinstance(inputs.tokenizer, WordTokenizer) else []
    found: list[str] = []
    for stage in config.stages:
        sets = [inputs.shards[stage.data.root / name].manifest.model_dump_json() for name in stage.data.train]
        excluded = sorted(inputs.exclusions[stage.data.root / stage.data.exclude]) if stage.data.exclude else []
        data = [hashlib.sha256(text.encode()).hexdigest() for text in (*sets, *words, *excluded)]
        found.append(fingerprint(config, stage, found[-1] if found else "", data))
    return found


def _completed(config: RunConfig, fingerprints: list[str]) -> set[str]:
    """Names of the leading stages that this very configuration has finished.

    Raises:
        UserError: a stage's folder was made by another configuration.
    """
    done: set[str] = set()
    leading = True
    for stage, expected in zip(config.stages, fingerprints, strict=True):
        folder = config.output_dir / stage.name
        manifest = read_export(folder / "export", verify=True)
        if manifest is not None and manifest["fingerprint"] != expected:
            raise UserError(
                f"{folder}: made from other settings or data than these (fingerprint {manifest['fingerprint']}, now"
                f" {expected}); choose another output_dir or remove the folder"
            )
        # A run that was stopped between export and evaluation trains nothing again, it only scores.
        # Stages behind an unfinished one are looked at too: `_run_stage` takes an export that is there for its own.
        leading = leading and manifest is not None and (folder / "metrics.json").is_file()
        if leading:
            done.add(stage.name)
    return done


def _run_stage(
    config: RunConfig, index: int, own: str, weights: str | None, inputs: Inputs, device: torch.device
) -> None:
    stage = config.stages[index]
    folder = config.output_dir / stage.name
    export = folder / "export"
    began = time.perf_counter()
    if read_export(export) is None:
        encoder = build_encoder(config.model, config.seed)
        _load(encoder, weights, config.model)
        record: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "steps": config.stage_steps(stage)}
        record["fingerprint"] = own
        record |= _train(config, index, encoder, inputs, device, folder)
        full_state = record.pop("full_state")
        if distributed.rank() == 0:
            words = inputs.tokenizer.words if isinstance(inputs.tokenizer, WordTokenizer) else None
            save_export(export, full_state, config.model, words, record)
        distributed.barrier()
    # Scored as whoever loads it later will see it: a fresh encoder with the weights of the file.
    encoder = build_encoder(config.model, config.seed)
    _load(encoder, str(export), config.model)
    scores = _evaluate(encoder, stage, inputs, device, config.model.image_size)
    _record_scores(config, stage.name, scores, time.perf_counter() - began)


def _train(
    config: RunConfig, index: int, encoder: DualEncoder, inputs: Inputs, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Trains a stage; returns the full weights and what the manifest should say of the parameters."""
    stage_config = config.stages[index]
    steps = config.stage_steps(stage_config)
    if steps == 0:
        return {
            "full_state": {f"encoder.{n}": t for n, t in encoder.state_dict().items()},
            "trainable": [],
            "frozen": [],
        }
    loader = _loader(config, index, inputs, device)
    if config.model.sync_batch_norm:
        if device.type != "cuda":
            raise UserError("model.sync_batch_norm: torch's SyncBatchNorm runs on GPUs only; remove the key")
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)  # type: ignore[no-untyped-call]
    # Heads are drawn from a seed of their own stage, whatever was drawn before.
    torch.manual_seed(_stage_seed(config, index))
    stage = build_stage(stage_config, encoder, loader.num_identities)
    engine = Engine(stage, stage_config.engine, stage_config.optimizer, loader.local_batch_size)
    say(
        f"{stage_config.name}: {steps} steps of {stage_config.data.global_batch_size} samples from {loader.num_samples}"
        f" ({loader.num_identities} identities, {loader.samples.excluded} samples excluded)"
        f" on {distributed.world_size()} ranks, ZeRO {stage_config.engine.zero_stage}, {stage_config.engine.precision}"
    )
    log = StageLog(
        stage_config.name,
        config.output_dir / "tensorboard",
        steps,
        stage_config.data.global_batch_size,
        config.log_every,
    )
    try:
        train(engine, loader, stage_config.optimizer, steps, device, log)
    finally:
        log.close()
    trainable = sorted(name for name, p in stage.named_parameters() if p.requires_grad)
    frozen = sorted(name for name, p in stage.named_parameters() if not p.requires_grad)
    full_state = engine.full_parameters()
    engine.close()
    if distributed.rank() == 0:
        write_json(folder / "training.json", log.history)
    return {"full_state": full_state, "trainable": trainable, "frozen": frozen, "identities": loader.num_identities}


def _loader(config: RunConfig, index: int, inputs: Inputs, device: torch.device) -> TrainLoader:
    stage = config.stages[index]
    data = stage.data
    with_text = not isinstance(stage, I2IStageConfig) or stage.loss.text_weight > 0
    samples = TrainingSamples(
        [inputs.shards[data.root / name] for name in data.train],
        config.model.image_size,
        inputs.tokenizer if with_text else None,
        Augment(**data.augment.model_dump()),
        inputs.cache if data.cache else None,
        exclude=inputs.exclusions[data.root / data.exclude] if data.exclude else frozenset(),
    )
    sampling = Sampling(
        data.global_batch_size,
        data.sampler,
        data.images_per_identity,
        stage.engine.gradient_accumulation_steps,
        _stage_seed(config, index),
    )
    return TrainLoader(
        samples,
        sampling,
        distributed.rank(),
        distributed.world_size(),
        data.workers,
        pin_memory=device.type == "cuda" and data.workers > 0,
    )


def _load(encoder: DualEncoder, weights: str | None, model: ModelConfig) -> None:
    if weights is not None:
        report = load_weights(encoder, weights, model.architecture, model.image_size, model.position_interpolation)
        say(f"weights {weights}: {report.summary()}")


def _evaluate_start(config: RunConfig, inputs: Inputs, device: torch.device) -> None:
    """Scores the weights that the first stage gets, so that every table has its zero line."""
    first = config.stages[0]
    if not (first.evaluation.t2i or first.evaluation.i2i):
        return
    scored = (config.output_dir / START / "metrics.json").is_file()
    if scored and (config.output_dir / first.name / "export").is_dir():
        return  # by this very configuration, else the stage's fingerprint would have been refused
    encoder = build_encoder(config.model, config.seed)
    _load(encoder, config.model.weights, config.model)
    began = time.perf_counter()
    scores = _evaluate(encoder, first, inputs, device, config.model.image_size)
    _record_scores(config, START, scores, time.perf_counter() - began)


def _evaluate(
    encoder: DualEncoder, stage: StageConfig, inputs: Inputs, device: torch.device, size: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """Metrics of every benchmark by task: {"t2i": {set: metrics}, "i2i": {set: metrics}}."""
    encoder.to(device)
    cache = inputs.cache if stage.data.cache else None
    scores: dict[str, dict[str, Any]] = {"t2i": {}, "i2i": {}}
    for task, names in (("t2i", stage.evaluation.t2i), ("i2i", stage.evaluation.i2i)):
        for name in names:
            shards = inputs.shards[stage.data.root / name]
            tokenizer = inputs.tokenizer if task == "t2i" else None
            pair = evaluate_benchmark(
                encoder, shards, tokenizer, size, stage.evaluation.batch_size, device, stage.evaluation.split, cache
            )
            if pair[task] is None:
                raise UserError(
                    f"evaluation.{task}: {shards.path} has nothing for this task in split {stage.evaluation.split}"
                )
            scores[task][name] = pair[task]
    return scores


def _record_scores(config: RunConfig, name: str, scores: dict[str, dict[str, Any]], seconds: float) -> None:
    for task, sets in scores.items():
        for shard_set, metrics in sets.items():
            say(
                f"{name}: {task} on {shard_set}: R1 {metrics['R1']:.1f}, R5 {metrics['R5']:.1f},"
                f" R10 {metrics['R10']:.1f}, mAP {metrics['mAP']:.1f}, mINP {metrics['mINP']:.1f}"
            )
            step = 0 if name == START else 1 + [stage.name for stage in config.stages].index(name)
            write_scalars(
                config.output_dir / "tensorboard",
                step,
                {f"evaluation/{task}/{shard_set}/{key}": metrics[key] for key in ("R1", "R5", "R10", "mAP", "mINP")},
            )
    if distributed.rank() == 0:
        write_json(config.output_dir / name / "metrics.json", {"name": name, "seconds": round(seconds, 1), **scores})
    distributed.barrier()


def read_scores(output_dir: Path, name: str) -> dict[str, Any]:
    """The metrics of a finished stage (or of `START`).

    Raises:
        UserError: the stage has not been evaluated.
    """
    path = output_dir / name / "metrics.json"
    try:
        scores: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read; run the recipe first") from error
    return scores


def _stage_seed(config: RunConfig, index: int) -> int:
    return config.seed * 1000 + index + 1
