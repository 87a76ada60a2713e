"""Scores as people read them: rows, means over seeds, and which model does what on whose data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reid_dist.evaluate.benchmarks import Benchmark
from reid_dist.evaluate.candidates import Candidate
from reid_dist.evaluate.records import Row
from reid_dist.evaluate.selection import Selection
from reid_dist.evaluation.benchmark import TaskKind
from reid_dist.evaluation.ranking import METRIC_KEYS
from reid_dist.evaluation.reranking.choice import Reranking
from reid_dist.report.document import Table
from reid_dist.report.table import PROTOCOL_NOTE

_HEAD = ("model", "benchmark", "task", "ranked by")


@dataclass(frozen=True)
class SeedMean:
    """One score of several models that differ in their seed alone.

    Attributes:
        models: their names.
        seeds: theirs.
        row: the first model's; benchmark, task and ranking are those of all.
        mean: by metric, in percent.
        std: sample standard deviation (n - 1) by metric.
    """

    models: list[str]
    seeds: list[int]
    row: Row
    mean: dict[str, float]
    std: dict[str, float]


def score_tables(rows: Sequence[Row]) -> list[Table]:
    """The plain scores, and apart from them those of re-rankings."""
    plain = [row for row in rows if row.reranking is None]
    re_ranked = [row for row in rows if row.reranking is not None]
    note = "Compare with rows of the same procedure and parameters only."
    return [*_scores("Scores", plain, PROTOCOL_NOTE), *_scores("Re-ranked scores", re_ranked, note)]


def _scores(title: str, rows: Sequence[Row], note: str) -> list[Table]:
    if not rows:
        return []
    head = [*_HEAD, *METRIC_KEYS, "queries", "skipped", "gallery", "tied"]
    cells = []
    for row in rows:
        metrics = row.metrics
        counts = [f"{metrics['queries']:.0f}", f"{metrics['skipped']:.0f}", str(row.gallery), f"{metrics['tied']:.1f}"]
        cells.append([row.model, *_names(row), *(f"{metrics[key]:.1f}" for key in METRIC_KEYS), *counts])
    return [Table(head, cells, title, note, texts=len(_HEAD))]


def _names(row: Row) -> list[str]:
    return [f"{row.benchmark} ({row.split})", row.task, row.ranked_by]


def _families(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Models that differ in nothing but their seed, two at least."""
    families: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.family is not None:
            families.setdefault(candidate.family, []).append(candidate)
    return [family for family in families.values() if len(family) > 1]


def _seeds(family: Sequence[Candidate]) -> list[int]:
    return [candidate.seed for candidate in family if candidate.seed is not None]


def seed_notes(candidates: Sequence[Candidate]) -> list[str]:
    """One line for each family that has no mean, because some of its models do not even differ in their seed."""
    return [
        f"{', '.join(candidate.name for candidate in family)}: differ in their seeds alone, but of equal seeds "
        f"({', '.join(map(str, _seeds(family)))}) there is no mean; leave out one of each two"
        for family in _families(candidates)
        if len(set(_seeds(family))) < len(family)
    ]


def seed_means(candidates: Sequence[Candidate], rows: Sequence[Row]) -> list[SeedMean]:
    """Means over models that differ in their seed alone, two at least; why there are none: `seed_notes`."""
    found = []
    for family in _families(candidates):
        seeds, names = _seeds(family), [candidate.name for candidate in family]
        if len(set(seeds)) < len(family):
            continue
        for first in (row for row in rows if row.model == names[0]):
            alike = [row for row in rows if row.model in names and _question(row) == _question(first)]
            values = {key: [row.metrics[key] for row in alike] for key in METRIC_KEYS}
            mean = {key: math.fsum(each) / len(each) for key, each in values.items()}
            std = {key: statistics.stdev(each) for key, each in values.items()}
            found.append(SeedMean(names, seeds, first, mean, std))
    return found


def _question(row: Row) -> tuple[str, str, TaskKind, Reranking | None]:
    return row.benchmark, row.split, row.task, row.reranking


def seed_table(means: Sequence[SeedMean]) -> list[Table]:
    """Mean and standard deviation; no table without any."""
    head = ["models", *_HEAD[1:], *METRIC_KEYS]
    cells = [
        [
            *(", ".join(each.models), *_names(each.row)),
            *(f"{each.mean[key]:.1f} ± {each.std[key]:.1f}" for key in METRIC_KEYS),
        ]
        for each in means
    ]
    note = "Mean ± sample standard deviation (n - 1) over models that differ in their seed alone."
    return [Table(head, cells, "Over seeds", note, texts=len(_HEAD))] if cells else []


def matrix_tables(candidates: Sequence[Candidate], benchmarks: Sequence[Benchmark], rows: Sequence[Row]) -> list[Table]:
    """For each task that several models were asked on several benchmarks: trained on x tested on, plain cosine."""
    tables = []
    for task in dict.fromkeys(row.task for row in rows):
        scores = {(row.model, row.benchmark): row for row in rows if row.task == task and row.reranking is None}
        models = [each for each in candidates if any(model == each.name for model, _ in scores)]
        asked = [each for each in benchmarks if any(name == each.name for _, name in scores)]
        if len(models) > 1 and len(asked) > 1:
            tables.append(_matrix(task, models, asked, lambda *key, scores=scores: scores.get(key)))
    return tables


def _matrix(
    task: str,
    models: Sequence[Candidate],
    asked: Sequence[Benchmark],
    score: Callable[[str, str], Row | None],
) -> Table:
    def cell(model: Candidate, benchmark: Benchmark) -> str:
        row = score(model.name, benchmark.name)
        if row is None:
            return "n/a"
        own = "*" if model.training.holds(benchmark.shards) else ""
        return f"{own}{row.metrics['R1']:.1f} / {row.metrics['mAP']:.1f}"

    head = ["model", "trained on", *(benchmark.title for benchmark in asked)]
    cells = [
        [model.name, ", ".join(model.training.names) or "unknown", *(cell(model, benchmark) for benchmark in asked)]
        for model in models
    ]
    note = "R1 / mAP in percent, plain cosine. *: the model was trained on the training split of this very set."
    return Table(head, cells, f"Trained on x tested on: {task}", note, texts=2)


def selection_table(selection: Selection) -> Table:
    """What each model scored on val, and which one was chosen."""
    label = selection.criterion.label
    cells = [
        [model, "chosen" if model == selection.chosen else "", f"{value:.2f}"]
        for model, value in selection.values.items()
    ]
    note = f"Mean over {', '.join(selection.benchmarks)}. Only the chosen model is scored further."
    return Table(["model", "", f"{label} on val"], cells, "Selection", note, texts=2)
