"""The models that are scored: found, verified and named before any of them is built."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid_dist.checkpoint.portable import ARCHITECTURE_FILE, fingerprint, read_export
from reid_dist.config import RunConfig
from reid_dist.errors import UserError
from reid_dist.evaluate.training_data import TrainingData, recipe_of, stages_until, training_data
from reid_dist.trained import find_export


@dataclass(frozen=True)
class Candidate:
    """A trained model that is to be scored.

    Attributes:
        name: short, no other candidate has it: run and stage.
        export: its folder.
        manifest: what the export says of itself.
        training: what it was trained on.
        seed: of its run; None without one.
        family: equal for models that differ in nothing but their seed; None without the settings of a run.
        root: where its last stage read its shard sets; None without the settings of a run.
    """

    name: str
    export: Path
    manifest: dict[str, Any]
    training: TrainingData
    seed: int | None
    family: str | None
    root: str | None

    @property
    def digest(self) -> str:
        """Hash of all that decides the features: weights, settings, words, architecture."""
        parts = [self.manifest["sha256"], json.dumps([self.manifest["model"], self.manifest["words"]], sort_keys=True)]
        architecture = self.export / ARCHITECTURE_FILE
        parts.append(architecture.read_text() if architecture.is_file() else "")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_candidates(runs: Sequence[Path], root: str | None = None) -> list[Candidate]:
    """Finds the models of runs, stages or exports and verifies their files.

    Args:
        runs: folders.
        root: where training sets may be that are not where the run read them; see `training_data`.

    Raises:
        UserError: one is not there, is damaged, or is named twice.
    """
    exports = [_export(path) for path in runs]
    for path, export in zip(runs, exports, strict=True):
        if exports.count(export) > 1:
            raise UserError(f"{path}: this model ({export}) is named twice; leave it out once")
    short = [_short_name(export) for export in exports]
    count = Counter(short)
    names = [str(export) if count[name] > 1 else name for name, export in zip(short, exports, strict=True)]
    return [_open(name, export, root) for name, export in zip(names, exports, strict=True)]


def _export(path: Path) -> Path:
    if not os.path.isdir(path):  # also of a name that no folder can have
        raise UserError(f"{path}: no such folder; name the folder of a run, of a stage, or its export")
    return find_export(path)


def _short_name(export: Path) -> str:
    place = export.resolve()
    return f"{place.parent.parent.name}/{place.parent.name}" if place.name == "export" else place.name


def _open(name: str, export: Path, root: str | None) -> Candidate:
    manifest = read_export(export, verify=True)
    assert manifest is not None  # `find_export` found it
    config, stage = recipe_of(export.resolve())
    return Candidate(
        name,
        export,
        manifest,
        training_data(export, root),
        seed=None if config is None else config.seed,
        family=None if config is None else _family(config, stage),
        root=None if config is None else stages_until(config, stage)[-1].data.root,
    )


def _family(config: RunConfig, name: str) -> str:
    same_seed, found = config.model_copy(update={"seed": 0}), ""
    for stage in stages_until(config, name):
        found = fingerprint(same_seed, stage, found)
    return found
