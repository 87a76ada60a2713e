"""The stages of one run, in order: train, export, evaluate; finished ones are skipped."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reid_dist import distributed
from reid_dist.checkpoint.portable import read_export, read_handover, save_export
from reid_dist.config import ModelConfig, RunConfig, TextLoss
from reid_dist.data.loader import TrainLoader
from reid_dist.data.stream.loader import StreamLoader
from reid_dist.engine import build_engine, prepare_environment
from reid_dist.errors import UserError
from reid_dist.evaluation.identity_means import identity_means
from reid_dist.files import write_json, write_text
from reid_dist.inputs import (
    Inputs,
    build_encoder,
    caption_losses,
    open_inputs,
    stage_fingerprints,
    stage_seed,
    train_loader,
)
from reid_dist.metrics import StageLog, say
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.first_weights import load_first_weights
from reid_dist.models.weights import load_weights
from reid_dist.recipe_file import dump_config
from reid_dist.scoring import START, evaluate, is_scored, record_scores
from reid_dist.stages import Surroundings, build_stage
from reid_dist.stages.text_losses import IDENTITY_IMAGES
from reid_dist.trainer import train


def run(config: RunConfig) -> None:
    """Runs a recipe on the ranks that the launcher started; every rank calls it.

    Raises:
        UserError: wrong input, before any training where it can be known.
    """
    inputs = open_inputs(config, distributed.environment_world_size())
    fingerprints = stage_fingerprints(config, inputs)
    completed = _completed(config, fingerprints)
    device = prepare_environment()
    distributed.initialize(device)
    if distributed.rank() == 0:
        write_text(config.output_dir / "config.yaml", dump_config(config))
    # Rank 0's view counts: on a network file system the others may not see its files yet.
    completed = distributed.broadcast_object(completed)
    weights: str | None = None  # the first
    _evaluate_start(config, inputs, device)
    for index, stage in enumerate(config.stages):
        folder = config.output_dir / stage.name
        if stage.name in completed:
            say(f"{stage.name}: complete in {folder}, skipped")
        else:
            _run_stage(config, index, fingerprints[index], weights, inputs, device)
        weights = str(folder / "export")


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
        leading = leading and manifest is not None and is_scored(config.output_dir, stage.name, stage)
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
    if distributed.broadcast_object(read_export(export) is None):
        encoder = build_encoder(config.model, config.seed)
        _load(encoder, weights, config.model)
        record: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "steps": config.stage_steps(stage)}
        record["fingerprint"] = own
        record |= _train(config, index, encoder, inputs, device, folder)
        full_state, handover = record.pop("full_state"), record.pop("handover", {})
        if distributed.rank() == 0:
            save_export(export, full_state, config.model, inputs.words or None, record, handover)
        distributed.barrier()
    # Scored as whoever loads it later will see it: a fresh encoder with the weights of the file.
    encoder = build_encoder(config.model, config.seed)
    _load(encoder, str(export), config.model)
    scores = evaluate(encoder, stage, inputs, device, config.model.image_size)
    record_scores(config, stage.name, stage.evaluation.split, scores, time.perf_counter() - began)


def _train(
    config: RunConfig, index: int, encoder: DualEncoder, inputs: Inputs, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Trains a stage; returns the full weights and what the manifest should say of the parameters."""
    stage_config = config.stages[index]
    steps = config.stage_steps(stage_config)
    if steps == 0:
        return {
            "full_state": {f"encoder.{n}": t for n, t in encoder.state_dict().items()},
            "handover": _left_before(config, index),
            "trainable": [],
            "frozen": [],
        }
    loader = train_loader(
        config, index, inputs, distributed.rank(), distributed.world_size(), pin_memory=device.type == "cuda"
    )
    if config.model.sync_batch_norm:
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)  # type: ignore[no-untyped-call]
    handed = _handed(config, index, encoder, loader, device)
    # Heads are drawn from a seed of their own stage, whatever was drawn before.
    seed = stage_seed(config, index)
    torch.manual_seed(seed)
    surroundings = Surroundings(
        loader.local_batch_size,
        device,
        stage_config.engine.precision,
        seed,
        loader.num_identities,
        inputs.tokenizer,
        handed,
    )
    stage = build_stage(stage_config, encoder, surroundings)
    engine = build_engine(stage, stage_config.engine, stage_config.optimizer, loader.local_batch_size)
    say(
        f"{stage_config.name}: {steps} steps of {stage_config.data.global_batch_size} samples {_source_of(loader)}"
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
        for message in loader.bad_samples.messages:
            print(f"rank {distributed.rank()}: replaced: {message}", flush=True)
    trainable = sorted(name for name, p in stage.named_parameters() if p.requires_grad)
    frozen = sorted(name for name, p in stage.named_parameters() if not p.requires_grad)
    full_state = engine.full_parameters()
    handover = stage.handover(full_state)
    engine.close()
    if distributed.rank() == 0:
        write_json(folder / "training.json", log.history)
    found = {"trainable": trainable, "frozen": frozen, "identities": loader.num_identities}
    return {"full_state": full_state, "handover": handover, **found}


def _handed(
    config: RunConfig, index: int, encoder: DualEncoder, loader: TrainLoader | StreamLoader, device: torch.device
) -> dict[str, Tensor]:
    """What a stage needs beside the encoder: from the stage before it, and of the images that it trains on."""
    handed, stage = _left_before(config, index), config.stages[index]
    text = caption_losses(stage)
    if isinstance(text, TextLoss) and text.with_prototypes and isinstance(loader, TrainLoader):
        means_CD = identity_means(encoder.to(device), loader.samples, stage.evaluation.batch_size, device)
        handed = {**handed, IDENTITY_IMAGES: means_CD}
    return handed


def _left_before(config: RunConfig, index: int) -> dict[str, Tensor]:
    return read_handover(config.output_dir / config.stages[index - 1].name / "export") if index else {}


def _source_of(loader: TrainLoader | StreamLoader) -> str:
    """Says what a stage trains on."""
    samples = "uncounted samples" if loader.num_samples is None else f"{loader.num_samples} samples"
    parts = f"{loader.num_tars} tars" if isinstance(loader, StreamLoader) else f"{loader.num_identities} identities"
    return f"from {samples} ({parts}, {loader.samples.excluded} samples excluded)"


def _load(encoder: DualEncoder, weights: str | None, model: ModelConfig) -> None:
    """Loads an export, or what the run begins with (None)."""
    if weights is None:
        for line in load_first_weights(encoder, model):
            say(line)
        return
    report = load_weights(encoder, weights, model.architecture, model.image_size, model.position_interpolation)
    say(f"weights {weights}: {report.summary()}")


def _evaluate_start(config: RunConfig, inputs: Inputs, device: torch.device) -> None:
    """Scores the weights that the first stage gets, so that every table has its zero line."""
    first = config.stages[0]
    if not (first.evaluation.t2i or first.evaluation.i2i):
        return
    trained = (config.output_dir / first.name / "export").is_dir()
    # Scores beside an export are of this very configuration, else the stage's fingerprint would have been refused.
    if distributed.broadcast_object(trained and is_scored(config.output_dir, START, first)):
        return
    encoder = build_encoder(config.model, config.seed)
    _load(encoder, None, config.model)
    began = time.perf_counter()
    scores = evaluate(encoder, first, inputs, device, config.model.image_size)
    record_scores(config, START, first.evaluation.split, scores, time.perf_counter() - began)
