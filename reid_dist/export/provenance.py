"""Where a model comes from: settings and scores of its run, and what the cards of its training sets say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from reid_dist.checkpoint.portable import read_export
from reid_dist.config import RunConfig, StageConfig
from reid_dist.data.remote import is_remote, join_location, read_file, shown_location
from reid_dist.data.sample import MANIFEST_NAME, Manifest
from reid_dist.errors import UserError
from reid_dist.recipe_file import load_config

METRICS = ("R1", "R5", "R10", "mAP", "mINP")
_MAX_MANIFEST_BYTES = 1 << 30


@dataclass(frozen=True)
class TrainingSet:
    """A shard set that a stage was trained on; `manifest` is None where it lies no longer, or is no shard set."""

    name: str
    stage: str
    manifest: Manifest | None

    def told(self, key: str) -> str:
        """What its card says of `title`, `licence`, `consent`, `source` or `citation`; empty: nothing."""
        return "" if self.manifest is None else str(self.manifest.card.get(key, ""))


class Score(NamedTuple):
    """A task of a benchmark, in percent: the run's own score, or one that launch/evaluate.py recorded."""

    task: str
    benchmark: str
    split: str
    ranked_by: str
    values: tuple[float, ...]  # in the order of METRICS


@dataclass
class Provenance:
    """What is known of a model beside its weights.

    Attributes:
        name: of the run.
        config: settings of the run; None: the weights lie in a folder without them.
        stages: those that made the weights, in order.
        sets: what they were trained on, and what the weights that they began with were.
        weights: names of the weights that the first stage began with; empty: random ones.
        scores: of the last stage.
        problems: what could not be read, one line each.
    """

    name: str
    config: RunConfig | None = None
    stages: Sequence[StageConfig] = ()
    sets: list[TrainingSet] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_provenance(export: Path, digest: str) -> Provenance:
    """Reads the run that an export lies in; what is missing is told, not an error: weights may have moved.

    Args:
        export: folder.
        digest: hash of its weights, which scores must be of.
    """
    found = _read_run(export.absolute())
    if found.config is None:
        return found
    found.scores = _own_scores(export.absolute().parent, found.problems)
    found.scores += _recorded_scores(export.absolute().parent, digest)
    waiting, seen = _first_exports(found), {export.resolve()}
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        earlier = _read_run(folder.absolute())
        found.sets[:0] = [replace(each, stage=f"{earlier.name}, {each.stage}") for each in earlier.sets]
        found.problems += earlier.problems
        waiting += _first_exports(earlier)
    return found


def shown_name(name: str) -> str:
    """A set or file as a card calls it: of a path or an address the last part, without what is secret in it."""
    return shown_location(name).rstrip("/").rpartition("/")[2] or name


def _read_run(export: Path) -> Provenance:
    """What the settings of a run say of one of its exports."""
    run, stage = export.parent.parent, export.parent.name
    path = run / "config.yaml"
    if export.name != "export" or not path.is_file():
        return Provenance(export.name, problems=[f"{export}: lies in no run, so its training data are not known"])
    try:
        config = load_config(path)
    except UserError as error:  # of an older version, perhaps
        return Provenance(run.name, problems=[str(error).splitlines()[0]])
    names = [each.name for each in config.stages]
    if stage not in names:
        return Provenance(run.name, problems=[f"{path}: knows no stage {stage}, so its training data are not known"])
    stages = [each for each in config.stages[: names.index(stage) + 1] if config.stage_steps(each)]
    given = filter(None, (config.model.weights, config.model.visual_weights))
    found = Provenance(run.name, config, stages, weights=[shown_name(weights) for weights in given])
    found.sets = [_training_set(each, name, found.problems) for each in stages for name in each.data.train]
    return found


def _training_set(stage: StageConfig, name: str, problems: list[str]) -> TrainingSet:
    place = join_location(stage.data.location(name), MANIFEST_NAME)
    try:
        data = read_file(place, _MAX_MANIFEST_BYTES) if is_remote(place) else Path(place).read_bytes()
        return TrainingSet(shown_name(name), stage.name, Manifest.model_validate_json(data))
    except (UserError, OSError, ValidationError) as error:
        reason = "is damaged" if isinstance(error, ValidationError) else "cannot be read"
        problems.append(f"{shown_location(place)}: {reason}, so the card tells no licence of this training set")
        return TrainingSet(shown_name(name), stage.name, None)


def _first_exports(run: Provenance) -> list[Path]:
    """The exports of ours that a run began with."""
    if run.config is None:
        return []
    given = [Path(each) for each in (run.config.model.weights, run.config.model.visual_weights) if each]
    folders = [path if path.is_dir() else path.parent for path in given if path.exists()]
    return [folder for folder in folders if read_export(folder) is not None]


def _own_scores(stage: Path, problems: list[str]) -> list[Score]:
    """What the run measured when the stage ended."""
    path = stage / "metrics.json"
    try:
        told = json.loads(path.read_text())
        return [
            Score(task.partition("_")[0], shown_name(name), str(told["split"]), _ranked_by(metrics), _values(metrics))
            for task in ("t2i", "i2i", "t2i_reranked")
            for name, metrics in told.get(task, {}).items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        problems.append(f"{path}: cannot be read, so the card lacks the scores of the run")
        return []


def _ranked_by(metrics: dict[str, float]) -> str:
    if "neighbours" not in metrics:
        return "cosine"
    return f"re-ranked: {metrics['neighbours']} neighbours, weight {metrics['weight']}"


def _recorded_scores(stage: Path, digest: str) -> list[Score]:
    """What launch/evaluate.py recorded of these very weights."""
    scores = []
    for path in sorted((stage / "evaluation").glob("*.json")):
        try:
            told = json.loads(path.read_text())
            if told["decides"]["model"] != digest:
                continue
            how = told["reranking"]
            ranked_by = "re-ranked: " + ", ".join(f"{key} {how[key]}" for key in how) if how else "cosine"
            names = str(told["task"]), shown_name(str(told["benchmark"])), str(told["split"]), ranked_by
            scores.append(Score(*names, _values(told["metrics"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a record that is damaged is no score
    return scores


def _values(metrics: dict[str, float]) -> tuple[float, ...]:
    return tuple(float(metrics[key]) for key in METRICS)
