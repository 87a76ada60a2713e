"""`--select`: one of the given models by a metric of the val split, so that the test split is asked once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.evaluate.benchmarks import Benchmark, choose_tasks
from reid_dist.evaluate.records import Row
from reid_dist.evaluation.benchmark import TASKS, TaskKind
from reid_dist.evaluation.ranking import METRIC_KEYS

SPLIT = "val"


@dataclass(frozen=True)
class Criterion:
    """What decides: a metric of plain cosine, its mean over the benchmarks that have the task.

    Attributes:
        task: of the metric.
        metric: one of METRIC_KEYS.
    """

    task: TaskKind
    metric: str

    @property
    def label(self) -> str:
        """As on the command line."""
        return f"{self.task}.{self.metric}"


@dataclass(frozen=True)
class Selection:
    """Which model was chosen, and why.

    Attributes:
        criterion: what decided.
        values: by model, in percent.
        benchmarks: the mean is over these.
        chosen: the greatest; of equal ones the first that was given.
    """

    criterion: Criterion
    values: dict[str, float]
    benchmarks: list[str]
    chosen: str


def parse_criterion(text: str) -> Criterion:
    """`t2i.mAP` and the like.

    Raises:
        UserError: no such task or metric.
    """
    known = {f"{task}.{metric}": Criterion(task, metric) for task in TASKS for metric in METRIC_KEYS}
    if text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"it is TASK.METRIC, of {', '.join(TASKS)} and {', '.join(METRIC_KEYS)}"
        )
        raise UserError(f"--select {text}: unknown; {hint}")
    return known[text]


def validation_benchmarks(sets: dict[str, ShardSet], criterion: Criterion) -> list[Benchmark]:
    """The val splits that have the task.

    Raises:
        UserError: there is none; the reason of the first.
    """
    found, problems = [], []
    for name, shards in sets.items():
        try:
            found += choose_tasks({name: shards}, SPLIT, [criterion.task])
        except UserError as error:
            problems.append(error)
    if not found:
        raise UserError(f"--select {criterion.label}: {problems[0]}")
    return found


def select(rows: Sequence[Row], criterion: Criterion) -> Selection:
    """Chooses among the models of some rows, which are of the criterion's task on the same benchmarks."""
    of_model: dict[str, list[float]] = {}
    for row in rows:
        of_model.setdefault(row.model, []).append(row.metrics[criterion.metric])
    values = {model: math.fsum(each) / len(each) for model, each in of_model.items()}
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    return Selection(criterion, values, benchmarks, max(values, key=lambda model: values[model]))
