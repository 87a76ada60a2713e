"""The portable export that one stage hands to the next: safetensors + JSON, whole or not there at all."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from reid_dist.config import ModelConfig, RunConfig, StageConfig
from reid_dist.data.transforms import decoder_name
from reid_dist.errors import UserError
from reid_dist.files import content_sha256, flush, replace_folder
from reid_dist.models.architecture import read_architecture
from reid_dist.models.weights import EXPORT_FILE, MANIFEST_FILE

FORMAT_VERSION = 1
HANDOVER_FILE = "handover.safetensors"
ARCHITECTURE_FILE = "architecture.json"  # where the architecture is a file, so that the export needs no other one
_PREFIX = "encoder."
# Of the model's settings: files whose content an export holds.
_WORDS = {"dictionary": True, "rows": True}
_NOT_NEEDED: Any = {"weights": True, "visual_weights": True, "vocabulary": True, "word_gru": _WORDS}
# What saves memory, and where words lie, whose content is hashed.
_KEPT_APART: Any = {"gradient_checkpointing": True, "vocabulary": True, "word_gru": _WORDS}


def fingerprint(config: RunConfig, stage: StageConfig, previous: str, data: Sequence[str] = ()) -> str:
    """Hash of everything that decides a stage's weights.

    Where the data lie, how they are read, how memory is saved and what is watched do not enter; what the data hold
    does, through `data`.

    Args:
        config: the run's.
        stage: one of its stages.
        previous: fingerprint of the stage before it; empty for the first.
        data: hashes of contents: training sets, word list, exclusions, architecture, first weights.
    """
    # `identities` is only for plans made without the data.
    reading = {"root", "workers", "cache", "identities"}
    watching = {"queue_sharded": True, "queue_check_every": True, "conflict_every": True}
    parts = {
        "model": config.model.model_dump(mode="json", exclude=_KEPT_APART),
        "seed": config.seed,
        "steps": config.stage_steps(stage),
        "stage": stage.model_dump(
            mode="json",
            exclude={"steps": True, "evaluation": True, "data": reading, "loss": {**watching, "text": watching}},
        ),
        "previous": previous,
        "data": list(data),
    }
    if config.guard.spike_sigma:  # decides which steps are made
        parts["guard"] = config.guard.model_dump(mode="json", exclude={"max_skips"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def save_export(
    folder: Path,
    full_state: dict[str, Tensor],
    model: ModelConfig,
    words: list[str] | None,
    record: dict[str, Any],
    handover: dict[str, Tensor] | None = None,
) -> None:
    """Writes the encoder of a finished stage; the heads of the stage stay behind.

    The folder appears under its name only when complete: written beside it, flushed to the disk, then renamed.

    Args:
        folder: replaced when it exists.
        full_state: the stage's fp32 parameters and buffers by name; those of `encoder` are kept.
        model: how to build the encoder again.
        words: the word list of its tokenizer; None for the architecture's own.
        record: what else the manifest should say (stage, steps, fingerprint, trainable parameters ...).
        handover: what the next stage needs beside the encoder.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {name.removeprefix(_PREFIX): t.contiguous() for name, t in full_state.items() if name.startswith(_PREFIX)}
    save_file(state, partial / EXPORT_FILE)
    if model.architecture.endswith(".json"):
        (partial / ARCHITECTURE_FILE).write_text(json.dumps(read_architecture(model.architecture), indent=1))
    manifest = {
        "format_version": FORMAT_VERSION,
        "sha256": file_sha256(partial / EXPORT_FILE),
        "handover_sha256": _save_handover(partial / HANDOVER_FILE, handover or {}),
        "model": model.model_dump(mode="json", exclude=_NOT_NEEDED),
        "words": words,
        "decoder": decoder_name(),
        "versions": {name: _version(name) for name in ("torch", "deepspeed", "open_clip_torch")},
        **record,
    }
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    for file in partial.iterdir():
        flush(file)
    replace_folder(partial, folder)


def _save_handover(path: Path, handover: dict[str, Tensor]) -> str | None:
    if not handover:
        return None
    save_file({name: tensor.cpu().contiguous() for name, tensor in handover.items()}, path)
    return file_sha256(path)


def read_handover(folder: Path) -> dict[str, Tensor]:
    """What a stage left for the next one beside its encoder; empty for most.

    Raises:
        UserError: it is damaged.
    """
    manifest = read_export(folder)
    expected = None if manifest is None else manifest.get("handover_sha256")
    if expected is None:
        return {}
    path = folder / HANDOVER_FILE
    if file_sha256(path) != expected:
        raise UserError(f"{path}: does not match its hash; remove {folder} to train the stage again")
    return load_file(path)


def read_export(folder: Path, verify: bool = False) -> dict[str, Any] | None:
    """The manifest of an export; None when there is no whole export in the folder.

    Args:
        folder: of one stage's export.
        verify: also compare the weights' hash.

    Raises:
        UserError: the manifest or the weights are damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove {folder} to train the stage again") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a manifest of format_version {FORMAT_VERSION}, which this program reads")
    if verify and file_sha256(folder / EXPORT_FILE) != manifest.get("sha256"):
        raise UserError(f"{folder / EXPORT_FILE}: does not match its hash; remove {folder} to train the stage again")
    return manifest


def file_sha256(path: Path) -> str:
    """Hash of a file's content, as hexadecimal digits."""
    try:
        return content_sha256(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); remove its folder to train the stage again"
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
