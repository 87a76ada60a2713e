"""What a model's weights were trained on, as the files of its run tell it, to be compared with the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reid_dist.checkpoint.portable import read_export
from reid_dist.config import DataConfig, RunConfig, StageConfig
from reid_dist.data.contamination import find_contamination, same_set
from reid_dist.data.exclude import NOTHING, Exclusions, read_exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import MANIFEST_NAME
from reid_dist.data.stream.source import StreamSource
from reid_dist.errors import UserError
from reid_dist.inputs import training_locations
from reid_dist.recipe_file import load_config

RECIPE_FILE = "config.yaml"


@dataclass
class TrainingData:
    """Sets whose training split shaped some weights.

    Attributes:
        names: as the recipes name them.
        sets: those that are there, with what was left out of each.
        unknown: one phrase for each that cannot be compared, and why.
    """

    names: list[str] = field(default_factory=list)
    sets: list[tuple[ShardSet, Exclusions]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def holds(self, shards: ShardSet) -> bool:
        """Whether the training split of this very set was trained on."""
        return any(same_set(shards, trained) for trained, _ in self.sets)

    def overlap(self, tested: Sequence[ShardSet]) -> list[str]:
        """One line for each training set that shares something with a set to be scored on."""
        lines = [line for trained, excluded in self.sets for line in find_contamination([trained], tested, excluded)]
        return list(dict.fromkeys(lines))


def recipe_of(export: Path) -> tuple[RunConfig | None, str]:
    """The settings of the run that an export lies in, or None; and its stage, or why there are none."""
    path, stage = export.parent.parent / RECIPE_FILE, export.parent.name
    if export.name != "export" or not path.is_file():
        return None, f"no {RECIPE_FILE} of its run lies above it"
    try:
        config = load_config(path)
    except UserError as error:  # of an older version, perhaps: the model itself is whole
        return None, str(error).splitlines()[0]
    if all(each.name != stage for each in config.stages):
        return None, f"{path} has no stage {stage}"
    return config, stage


def stages_until(config: RunConfig, name: str) -> list[StageConfig]:
    """The stages that shaped the weights of one, itself the last."""
    names = [stage.name for stage in config.stages]
    return list(config.stages[: names.index(name) + 1])


def training_data(export: Path, root: str | None = None) -> TrainingData:
    """What an export was trained on, and the exports that it started from.

    Args:
        export: its folder.
        root: folder or address of shard sets, for those that are not any more where the run read them.
    """
    found, seen, waiting = TrainingData(), set[Path](), [export]
    while waiting:
        place = waiting.pop(0).resolve()
        if place in seen:
            continue
        seen.add(place)
        config, stage = recipe_of(place)
        if config is None:
            _tell(found, f"what {place} was trained on ({stage})")
            continue
        for each in stages_until(config, stage):
            if config.stage_steps(each):
                _add_sets(found, each, root)
        waiting += _first_weights(config, found)
    return found


def _first_weights(config: RunConfig, found: TrainingData) -> Iterable[Path]:
    for weights in filter(None, (config.model.weights, config.model.visual_weights)):
        folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        if Path(weights).exists() and read_export(folder) is not None:
            yield folder
        else:
            _tell(found, f"what the first weights {weights} were trained on")


def _add_sets(found: TrainingData, stage: StageConfig, root: str | None) -> None:
    excluded = NOTHING
    if stage.data.exclude:
        try:
            excluded = read_exclusions(stage.data.location(stage.data.exclude))
        except UserError as error:
            _tell(found, f"what stage {stage.name} left out ({error})")
    for name, location in zip(stage.data.train, training_locations(stage), strict=True):
        if name not in found.names:
            found.names.append(name)
        try:
            shards = _training_set(stage, name, location, root)
        except UserError as error:
            _tell(found, f"training set {name} ({str(error).partition(';')[0]})")
            continue
        if shards is None:
            _tell(found, f"training set {name} (tars without an index)")
        elif not any(shards.location == other.location and excluded == left for other, left in found.sets):
            found.sets.append((shards, excluded))


def _training_set(stage: StageConfig, name: str, location: str, root: str | None) -> ShardSet | None:
    try:
        return StreamSource(location).shards if stage.data.reader == "stream" else ShardSet(location)
    except UserError:
        moved = None if root is None else DataConfig(root=root).location(name)
        if moved is None or not (Path(moved) / MANIFEST_NAME).is_file():
            raise
        return ShardSet(moved)


def _tell(found: TrainingData, line: str) -> None:
    if line not in found.unknown:
        found.unknown.append(line)
