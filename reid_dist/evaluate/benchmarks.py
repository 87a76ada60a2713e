"""Which sets a person asks for, and which tasks they allow; all that an index can tell is told before any encoding.

Shape suffixes: E pairs of a query and a gallery entry of its identity.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reid_dist.config import DataConfig
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.remote import is_remote
from reid_dist.data.sample import MANIFEST_NAME
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import TASKS, TaskKind, require_rows
from reid_dist.evaluation.counting import SameIdentity

_NEEDS = {
    "t2i": "captions of its query or gallery images",
    "i2t": "captions of its query or gallery images",
    "i2i": "both query and gallery images",
}


@dataclass(frozen=True)
class Benchmark:
    """A split of a shard set.

    Attributes:
        name: short, no other benchmark of the evaluation has it.
        shards: the set.
        split: test or val.
        tasks: what is asked of it, in the order of `TASKS`.
    """

    name: str
    shards: ShardSet
    split: str
    tasks: tuple[TaskKind, ...]

    @property
    def title(self) -> str:
        """Name and split."""
        return f"{self.name} ({self.split})"


def open_sets(names: Sequence[str], root: str) -> dict[str, ShardSet]:
    """Opens shard sets by short names.

    Args:
        names: sets below the root, folders or addresses.
        root: folder or address of shard sets.

    Raises:
        UserError: a set that is not there, is damaged, or is named twice.
    """
    found: dict[str, ShardSet] = {}
    for given in names:
        shards = ShardSet(_location(given, root))
        short = given if "/" not in given else Path(shards.shown).name
        name = given if short in found else short
        if name in found or any(shards.location == other.location for other in found.values()):
            raise UserError(f"--benchmarks {given}: stands twice; leave it out once")
        found[name] = shards
    return found


def choose_tasks(sets: dict[str, ShardSet], split: str, wanted: Sequence[TaskKind]) -> list[Benchmark]:
    """What is asked of each set.

    Args:
        sets: by name.
        split: test or val.
        wanted: tasks; none: all that a set allows.

    Raises:
        UserError: a set allows none of them, or has nothing to get right or wrong in one of them.
    """
    chosen = []
    for name, shards in sets.items():
        rows = require_rows(shards, split)
        possible = _possible_tasks(shards, rows)
        tasks = tuple(task for task in TASKS if task in possible and (not wanted or task in wanted))
        if not tasks:
            lacking = "; ".join(f"{task} needs {_NEEDS[task]}" for task in (wanted or ("t2i", "i2i")))
            raise UserError(f"{name}: split {split} has nothing for these tasks ({lacking}); leave the set out")
        _require_choice(name, split, shards, rows, tasks)
        chosen.append(Benchmark(name, shards, split, tasks))
    return chosen


def _location(given: str, root: str) -> str:
    below = DataConfig(root=root).location(given)
    for place in (below, given):
        # Of a name that no file can have, os.path says that it is not there.
        if given and (is_remote(place) or os.path.isfile(os.path.join(place, MANIFEST_NAME))):
            return place
    known = [name for name in _names(root) if os.path.isfile(os.path.join(root, name, MANIFEST_NAME))]
    there = f"sets in {root}: {', '.join(known)}" if known else f"{root} holds no shard sets; name their folder: --data"
    incomplete = f", as {below} has no {MANIFEST_NAME}" if os.path.basename(below) and os.path.isdir(below) else ""
    raise UserError(f"--benchmarks {given or repr(given)}: no such shard set{incomplete}; {there}")


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _role(shards: ShardSet, rows: Rows, *names: str) -> Rows:
    return np.intersect1d(rows, shards.rows(None, names))


def _possible_tasks(shards: ShardSet, rows: Rows) -> set[TaskKind]:
    possible: set[TaskKind] = set()
    if len(_described(shards, rows)):
        possible |= {"t2i", "i2t"}
    if len(_role(shards, rows, "query")) and len(_gallery(shards, rows, "i2i")):
        possible.add("i2i")
    return possible


def _require_choice(name: str, split: str, shards: ShardSet, rows: Rows, tasks: Sequence[TaskKind]) -> None:
    """Refuses a task whose every answer would be right, and one whose queries no answer could be right for."""
    found = {task: _lacks_choice(shards, rows, task) for task in tasks}
    problems = [f"{task} {problem}" for task, problem in found.items() if problem]
    if problems:
        rest = " ".join(task for task, problem in found.items() if not problem)
        remedy = f"--tasks {rest} scores the rest" if rest else "choose another split or set"
        raise UserError(f"{name}: split {split}: {'; '.join(problems)}; {remedy}")


def _lacks_choice(shards: ShardSet, rows: Rows, task: TaskKind) -> str:
    gallery = _gallery(shards, rows, task)
    if len(np.unique(shards.index["pid"][gallery])) == 1:
        return "has a gallery of one identity, so that any answer would be right"
    if task == "i2i" and not _can_be_found(shards, _role(shards, rows, "query"), gallery):
        return "has nothing to find, as no identity is asked for by one camera and seen by another"
    return ""


def _gallery(shards: ShardSet, rows: Rows, task: TaskKind) -> Rows:
    """Rows of the images, or of the images of the captions, that answer a task; see `evaluation.benchmark`."""
    if task == "t2i":
        return rows
    if task == "i2i":
        return _role(shards, rows, "gallery", "distractor")
    return _described(shards, rows)


def _described(shards: ShardSet, rows: Rows) -> Rows:
    """Rows of the images whose captions are asked or found."""
    asked = _role(shards, rows, "query", "gallery")
    return asked[shards.index["captions"][asked] > 0]


def _can_be_found(shards: ShardSet, asking: Rows, gallery: Rows) -> bool:
    """Whether the camera rule leaves any image query something to find."""

    def labels(rows: Rows) -> tuple[Tensor, Tensor]:
        pid, camid = (torch.from_numpy(shards.index[key][rows].astype(np.int64)) for key in ("pid", "camid"))
        return pid, camid

    _, _, kept_E = SameIdentity(*labels(gallery)).pairs(*labels(asking))
    return bool(kept_E.any())
