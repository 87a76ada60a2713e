"""The training of one stage of a run: from what it goes on with to the weights that it leaves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reid_dist import distributed
from reid_dist.checkpoint.portable import read_handover
from reid_dist.checkpoint.reader import Checkpoint, open_checkpoint
from reid_dist.checkpoint.resume import choose
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.config import RunConfig, StageConfig, TextLoss
from reid_dist.data.loader import TrainLoader
from reid_dist.data.stream.loader import StreamLoader
from reid_dist.engine import Engine, build_engine
from reid_dist.errors import UserError
from reid_dist.evaluation.identity_means import identity_means
from reid_dist.files import write_json
from reid_dist.guard import Guard
from reid_dist.inputs import Inputs, caption_losses, stage_seed, train_loader
from reid_dist.ledger import Ledger
from reid_dist.metrics import StageLog, say
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.slow_ranks import OwnWork
from reid_dist.stages import Surroundings, build_stage
from reid_dist.stages.text_losses import IDENTITY_IMAGES
from reid_dist.supervision.agreement import StopAgreement
from reid_dist.supervision.signals import StopRequest
from reid_dist.supervision.watchdog import Watchdog
from reid_dist.trainer import Companions, train
from reid_dist.training_state import TrainingState

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Resume:
    """What a run does with what an earlier one has left in its folder.

    Attributes:
        how: `auto` goes on where there is something; `must` refuses where there is not; `never` where there is; else
            the folder of a checkpoint of the first stage that is not finished.
        fallback: a damaged checkpoint is passed over for the newest good one before it, instead of refused.
    """

    how: str = "auto"
    fallback: bool = False


AUTO = Resume()


@dataclass(frozen=True)
class Run:
    """A run on this rank, and what every stage of it needs."""

    config: RunConfig
    inputs: Inputs
    fingerprints: list[str]
    device: torch.device
    resume: Resume
    watchdog: Watchdog
    request: StopRequest
    stop: StopAgreement
    unfinished: str | None  # first stage without an export when the run began


def train_stage(run: Run, index: int, encoder: DualEncoder) -> dict[str, Any]:
    """Trains a stage; returns the full weights and what the manifest should say of the parameters."""
    config, device = run.config, run.device
    stage_config = config.stages[index]
    steps = config.stage_steps(stage_config)
    if steps == 0:
        return {
            "full_state": {f"encoder.{n}": t for n, t in encoder.state_dict().items()},
            "handover": _left_before(config, index),
            "trainable": [],
            "frozen": [],
        }
    with run.watchdog.pause(f"preparation of {stage_config.name}"), run.request.nothing_to_save():
        checkpoint = _checkpoint(run, index)
        loader = _loader(run, index, checkpoint)
        engine = _engine(run, index, encoder, loader)
    stage = engine.stage
    say(
        f"{stage_config.name}: {steps} steps of {stage_config.data.global_batch_size} samples {_source_of(loader)}"
        f" on {distributed.world_size()} ranks, {engine.described}"
    )
    if checkpoint is not None:
        say(f"{stage_config.name}: goes on after step {checkpoint.manifest.step}, from {checkpoint.folder}")
    with _log(run, stage_config, steps) as log, _companions(run, index, checkpoint) as companions:
        guard = Guard(config.guard, engine, loader.describe)
        about = _about(run, index)
        state = TrainingState(engine, loader, log, guard, device, about, stage_config.data.global_batch_size)
        try:
            train(state, stage_config.optimizer, steps, companions, checkpoint)
        finally:
            for message in loader.bad_samples.messages:
                print(f"rank {distributed.rank()}: replaced: {message}", flush=True)
    trainable = sorted(name for name, p in stage.named_parameters() if p.requires_grad)
    frozen = sorted(name for name, p in stage.named_parameters() if not p.requires_grad)
    full_state = engine.full_parameters()
    with engine.callable_modules():
        handover = stage.handover(full_state)
    engine.close()
    if distributed.rank() == 0:
        write_json(config.output_dir / stage_config.name / "training.json", log.history)
    found = {"trainable": trainable, "frozen": frozen, "identities": loader.num_identities}
    return {"full_state": full_state, "handover": handover, **found}


def _checkpoint(run: Run, index: int) -> Checkpoint | None:
    """What the training of a stage goes on from; None to begin.

    Raises:
        UserError: it is damaged, or of another stage, other settings or other data.
    """
    stage, resume = run.config.stages[index], run.resume
    named = resume.how not in ("auto", "must", "never") and stage.name == run.unfinished
    folder = run.config.output_dir / stage.name / CHECKPOINTS
    found = choose(folder, Path(resume.how) if named else "auto", resume.fallback)
    if found is None:
        return None
    checkpoint = open_checkpoint(found)
    saved = checkpoint.manifest
    if (saved.stage, saved.fingerprint) != (stage.name, run.fingerprints[index]):
        raise UserError(
            f"{found}: made by stage {saved.stage} from settings or data of fingerprint {saved.fingerprint}, not by"
            f" {stage.name} from these ({run.fingerprints[index]}); give the settings that it was made with, or choose"
            " another output_dir"
        )
    return checkpoint


def _loader(run: Run, index: int, checkpoint: Checkpoint | None) -> TrainLoader | StreamLoader:
    """This rank's batches, from where the checkpoint stands."""
    positions = []
    if checkpoint is not None:
        positions = [checkpoint.values(rank)["loader"] for rank in range(checkpoint.manifest.world_size)]
    pin_memory = run.device.type == "cuda"
    return train_loader(
        run.config, index, run.inputs, distributed.rank(), distributed.world_size(), pin_memory, positions
    )


def _engine(run: Run, index: int, encoder: DualEncoder, loader: TrainLoader | StreamLoader) -> Engine:
    """The stage's model and losses, on the device and behind the configured engine."""
    config, stage_config = run.config, run.config.stages[index]
    if config.model.sync_batch_norm:
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)  # type: ignore[no-untyped-call]
    handed = _handed(config, index, encoder, loader, run.device)
    # Heads are drawn from a seed of their own stage, whatever was drawn before.
    seed = stage_seed(config, index)
    torch.manual_seed(seed)
    surroundings = Surroundings(
        loader.local_batch_size,
        run.device,
        stage_config.engine.precision,
        seed,
        loader.num_identities,
        run.inputs.tokenizer,
        handed,
    )
    stage = build_stage(stage_config, encoder, surroundings)
    return build_engine(stage, stage_config.engine, stage_config.optimizer, loader.local_batch_size)


@contextmanager
def _log(run: Run, stage: StageConfig, steps: int) -> Iterator[StageLog]:
    config = run.config
    own_work = OwnWork(run.device, config.supervision.slow_ratio)
    folder = config.output_dir / "tensorboard"
    log = StageLog(stage.name, folder, steps, stage.data.global_batch_size, config.log_every, own_work)
    try:
        yield log
    finally:
        own_work.close()
        log.close()


@contextmanager
def _companions(run: Run, index: int, checkpoint: Checkpoint | None) -> Iterator[Companions]:
    config = run.config
    folder, keeping = config.output_dir / config.stages[index].name, config.checkpoint
    writer = CheckpointWriter(folder / CHECKPOINTS, keeping.keep, keeping.best, keeping.asynchronous)
    start = 0 if checkpoint is None else checkpoint.manifest.step
    ledger = Ledger(folder / "ledger", start) if config.ledger else None
    try:
        yield Companions(run.watchdog, run.stop, config.supervision.desync_every, ledger, writer, keeping.every)
    finally:
        writer.close(config.supervision.grace_s)
        if ledger is not None:
            ledger.close()


def _about(run: Run, index: int) -> dict[str, Any]:
    """What every checkpoint of a stage says of it."""
    config, stage = run.config, run.config.stages[index]
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "steps": config.stage_steps(stage),
        "fingerprint": run.fingerprints[index],
        "model": config.model.model_dump(mode="json"),
        "words": run.inputs.words or None,
    }


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
