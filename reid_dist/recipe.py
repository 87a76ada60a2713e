"""The stages of one run, in order: train, export, evaluate; finished ones are skipped, an unfinished one goes on."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from reid_dist import distributed
from reid_dist.checkpoint.agreement import on_rank_0
from reid_dist.checkpoint.portable import read_export, save_export
from reid_dist.checkpoint.resume import latest_checkpoint
from reid_dist.checkpoint.retention import purge_finished, saved_steps
from reid_dist.config import ModelConfig, RunConfig
from reid_dist.engine import prepare_environment, require_backend
from reid_dist.errors import CheckpointError, Stopped, UserError
from reid_dist.files import write_text
from reid_dist.inputs import (
    Inputs,
    build_encoder,
    open_inputs,
    stage_fingerprints,
)
from reid_dist.metrics import say
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.first_weights import load_first_weights
from reid_dist.models.weights import load_weights
from reid_dist.preflight import check_alike
from reid_dist.recipe_file import dump_config
from reid_dist.scoring import START, evaluate, is_scored, record_scores
from reid_dist.stage_training import AUTO, CHECKPOINTS, Resume, Run, train_stage
from reid_dist.supervision.agreement import StopAgreement
from reid_dist.supervision.signals import StopRequest
from reid_dist.supervision.watchdog import Watchdog


def run(config: RunConfig, resume: Resume = AUTO) -> None:
    """Runs a recipe on the ranks that the launcher started; every rank calls it.

    Raises:
        UserError: wrong input, before any training where it can be known.
        NonFiniteError, DivergenceError, CheckpointError: see `trainer.train`.
        Stopped: the ranks were told to stop, and have saved.
    """
    for stage in config.stages:
        if config.stage_steps(stage):
            require_backend(stage.engine)
    watching = config.supervision
    with ExitStack() as locked, StopRequest(watching.grace_s) as request:
        with request.nothing_to_save():
            inputs = open_inputs(config, distributed.environment_world_size())
            fingerprints = stage_fingerprints(config, inputs)
            completed = _completed(config, fingerprints)
            device = prepare_environment()
            distributed.initialize(device)
            check_alike(config, inputs, {"--resume": resume.how, "--fallback": str(resume.fallback)})
            locked.enter_context(_lock(config.output_dir))
            # Rank 0's view counts: on a network file system the others may not see its files yet.
            completed = distributed.broadcast_object(completed)
            unfinished = distributed.broadcast_object(_unfinished(config))
            _check_resume(config, completed, resume)
            on_rank_0(lambda: write_text(config.output_dir / "config.yaml", dump_config(config)), _unwritable)
        with Watchdog(watching.hang_s, config.output_dir / "hang") as watchdog:
            stop = StopAgreement(request)
            _run_stages(
                Run(config, inputs, fingerprints, device, resume, watchdog, request, stop, unfinished), completed
            )
            stop.close()


@contextmanager
def _lock(output_dir: Path) -> Iterator[None]:
    """Keeps another run out of the folder: two would remove each other's checkpoints. Collective.

    Raises:
        UserError: on every rank: another run is in it.
    """
    held: list[IO[str]] = []

    def take() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        held.append((output_dir / ".lock").open("w"))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{output_dir}: another run is in it; wait for its end, or choose another output_dir"
            ) from None

    try:
        on_rank_0(take)
        yield
    finally:
        for file in held:
            file.close()


def _unfinished(config: RunConfig) -> str | None:
    """The first stage that has not left an export."""
    return next((s.name for s in config.stages if not (config.output_dir / s.name / "export").is_dir()), None)


def _unwritable(words: str) -> CheckpointError:
    return CheckpointError(f"{words}; make room, or choose another output_dir")


def _run_stages(run: Run, completed: set[str]) -> None:
    config = run.config
    weights: str | None = None  # the first
    with run.watchdog.pause("evaluation of the first weights"), run.request.nothing_to_save():
        _evaluate_start(config, run.inputs, run.device)
    for index, stage in enumerate(config.stages):
        folder = config.output_dir / stage.name
        if stage.name in completed:
            say(f"{stage.name}: complete in {folder}, skipped")
        else:
            _run_stage(run, index, weights)
        weights = str(folder / "export")


def _check_resume(config: RunConfig, completed: set[str], resume: Resume) -> None:
    """Looks whether what is there is what the run is to find.

    Raises:
        UserError: something where nothing, or nothing where something should be.
    """
    folders = [config.output_dir / stage.name for stage in config.stages]
    there = [folder for folder in folders if (folder / "export").is_dir() or saved_steps(folder / CHECKPOINTS)]
    there = distributed.broadcast_object(there)
    if resume.how == "never" and there:
        raise UserError(f"--resume never: {there[0]} holds earlier work; choose another output_dir, or remove it")
    if resume.how == "must" and not there:
        raise UserError(f"--resume must: {config.output_dir} holds neither a checkpoint nor a finished stage")
    if resume.how not in ("auto", "must", "never"):
        if len(completed) == len(folders):
            raise UserError(f"--resume {resume.how}: all stages in {config.output_dir} are finished")
        on_rank_0(lambda: latest_checkpoint(Path(resume.how), True, resume.fallback))


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


def _run_stage(run: Run, index: int, weights: str | None) -> None:
    config, inputs, device, watchdog = run.config, run.inputs, run.device, run.watchdog
    stage = config.stages[index]
    folder = config.output_dir / stage.name
    export = folder / "export"
    began = time.perf_counter()
    if distributed.broadcast_object(read_export(export) is None):
        watchdog.at(f"preparation of {stage.name}", 0)
        encoder = build_encoder(config.model, config.seed)
        _load(encoder, weights, config.model)
        record: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "steps": config.stage_steps(stage)}
        record["fingerprint"] = run.fingerprints[index]
        record |= train_stage(run, index, encoder)
        full_state, handover = record.pop("full_state"), record.pop("handover", {})
        watchdog.at(f"export of {stage.name}", 0)
        words = inputs.words or None
        on_rank_0(lambda: save_export(export, full_state, config.model, words, record, handover), _unwritable)
        if signal := run.stop.agree():
            raise Stopped(f"{signal}: {stage.name} is trained; start again to go on")
    if distributed.rank() == 0:
        _remove_checkpoints(folder / CHECKPOINTS, config.checkpoint.best)
    # Scored as whoever loads it later will see it: a fresh encoder with the weights of the file.
    encoder = build_encoder(config.model, config.seed)
    _load(encoder, str(export), config.model)
    with watchdog.pause(f"evaluation of {stage.name}"), run.request.nothing_to_save():
        scores = evaluate(encoder, stage, inputs, device, config.model.image_size)
    record_scores(config, stage.name, stage.evaluation.split, scores, time.perf_counter() - began)


def _remove_checkpoints(folder: Path, best: bool) -> None:
    """Removes those of a finished stage, also what a kill right after the export has left."""
    try:
        purge_finished(folder, best)
    except OSError as error:
        say(f"{folder}: cannot be removed ({error}); nothing needs it any more")


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
