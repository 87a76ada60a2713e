"""Which sets a person asks for, and which tasks they allow; all that an index can tell is told before any encoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.remote import is_remote
from reid_dist.data.sample import MANIFEST_NAME
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import TASKS, TaskKind, require_rows

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
    if is_remote(below) or Path(below).is_dir():
        return below
    if Path(given).is_dir():
        return given
    known = sorted(path.parent.name for path in Path(root).glob(f"*/{MANIFEST_NAME}"))
    there = f"sets in {root}: {', '.join(known)}" if known else f"{root} holds no shard sets; name their folder: --data"
    raise UserError(f"--benchmarks {given}: no such shard set; {there}")


def _role(shards: ShardSet, rows: Rows, *names: str) -> Rows:
    return np.intersect1d(rows, shards.rows(None, names))


def _possible_tasks(shards: ShardSet, rows: Rows) -> set[TaskKind]:
    asking, sought = _role(shards, rows, "query"), _role(shards, rows, "gallery", "distractor")
    described = _role(shards, rows, "query", "gallery")
    possible: set[TaskKind] = set()
    if shards.index["captions"][described].any():
        possible |= {"t2i", "i2t"}
    if len(asking) and len(sought):
        possible.add("i2i")
    return possible


def _require_choice(name: str, split: str, shards: ShardSet, rows: Rows, tasks: Iterable[TaskKind]) -> None:
    """Refuses a set whose every answer would be right, and image queries that no answer could be right for."""
    if len(np.unique(shards.index["pid"][rows])) == 1:
        shown = "one image" if len(rows) == 1 else f"{len(rows)} images of one identity"
        raise UserError(f"{name}: split {split} is {shown}: any answer would be right; choose another split or set")
    if "i2i" in tasks and not _can_be_found(shards, rows):
        rest = " ".join(task for task in tasks if task != "i2i")
        remedy = f"--tasks {rest} scores the rest" if rest else "choose another split or set"
        raise UserError(
            f"{name}: in split {split} no identity is asked for by one camera and seen by another, so that i2i has "
            f"nothing to find; {remedy}"
        )


def _can_be_found(shards: ShardSet, rows: Rows) -> bool:
    """Whether the camera rule leaves any image query something to find; an unknown camera, -1, removes nothing."""
    cameras_of: dict[int, set[int]] = {}
    sought = shards.index[_role(shards, rows, "gallery", "distractor")]
    for pid, camera in zip(sought["pid"].tolist(), sought["camid"].tolist(), strict=True):
        cameras_of.setdefault(pid, set()).add(camera)
    asking = shards.index[_role(shards, rows, "query")]
    queries = zip(asking["pid"].tolist(), asking["camid"].tolist(), strict=True)
    return any(cameras_of.get(pid, set()) - ({camera} if camera >= 0 else set()) for pid, camera in queries)
