"""One model on its benchmarks: what is recorded is read, the rest is encoded once and ranked task by task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from reid_dist import distributed
from reid_dist.evaluate.benchmarks import Benchmark
from reid_dist.evaluate.candidates import Candidate
from reid_dist.evaluate.records import Records, Row
from reid_dist.evaluation.benchmark import TASKS, TaskKind, TaskResult, extract_benchmark, score_task
from reid_dist.evaluation.features import Features
from reid_dist.evaluation.reranking.choice import Reranking
from reid_dist.metrics import say
from reid_dist.models.dual_encoder import Task as ImageTask
from reid_dist.report.page import Section
from reid_dist.trained import TrainedModel

Question = tuple[TaskKind, Reranking | None]


@dataclass(frozen=True)
class Settings:
    """How everything is scored.

    Attributes:
        rerankings: rows beside plain cosine.
        batch_size: images encoded at a time on each rank.
        device: of this rank.
        again: score what is recorded too.
        keep_sections: for a report; it needs rankings, so that everything is scored again.
    """

    rerankings: Sequence[Reranking]
    batch_size: int
    device: torch.device
    again: bool = False
    keep_sections: bool = False


@dataclass
class Scores:
    """What was found.

    Attributes:
        rows: in the order asked.
        sections: of a report, on rank 0.
        notes: what a reader of the rows should know.
    """

    rows: list[Row] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Scores) -> None:
        """Appends another model's."""
        self.rows += other.rows
        self.sections += other.sections
        self.notes += [note for note in other.notes if note not in self.notes]


def score_candidate(candidate: Candidate, benchmarks: Sequence[Benchmark], settings: Settings) -> Scores:
    """Rows of a model. A collective with the same rows on every rank.

    Raises:
        UserError: an image does not decode, or the features hold nan or inf.
    """
    scorer = _Scorer(candidate, settings)
    for benchmark in benchmarks:
        scorer.score(benchmark)
    return scorer.found


class _Scorer:
    """One model; loaded when the first score is not recorded."""

    def __init__(self, candidate: Candidate, settings: Settings) -> None:
        self.found = Scores()
        self._candidate, self._settings = candidate, settings
        self._model: TrainedModel | None = None

    def score(self, benchmark: Benchmark) -> None:
        """Adds the rows of a benchmark to `found`."""
        settings = self._settings
        questions: list[Question] = [(task, way) for task in benchmark.tasks for way in (None, *settings.rerankings)]
        records = Records(self._candidate, benchmark)
        recorded = {question: records.read(*question) for question in questions}
        # Rank 0's view counts: on a network file system the others may not see its files yet.
        known: dict[Question, Row | None] = distributed.broadcast_object(recorded)
        read = {} if settings.again or settings.keep_sections else {each: row for each, row in known.items() if row}
        for row in read.values():
            say(f"{_title(row)}: {_numbers(row)} [recorded on {row.scored[:10]}, not scored again; --again does]")
        fresh = self._answers(benchmark, [each for each in questions if each not in read], records)
        for question, row in fresh.items():
            self._compare(row, known[question])
        self.found.rows += [(read | fresh)[question] for question in questions]
        if records.problem:
            self.found.notes.append(records.problem)

    def _answers(self, benchmark: Benchmark, questions: Sequence[Question], records: Records) -> dict[Question, Row]:
        """Encodes a benchmark, once for each kind of image features that its questions need, and ranks."""
        rows: dict[Question, Row] = {}
        if not questions:
            return rows
        if self._model is None:
            self._model = TrainedModel(self._candidate.export, self._settings.device)
        for image_task, tasks in _image_features(self._model).items():
            own = [(task, way) for task, way in questions if task in tasks]
            if own:
                features = self._encode(self._model, image_task, benchmark, any(task != "i2i" for task, _ in own))
                results = [self._answer(features, question, records, rows) for question in own]
                self._keep(benchmark, features, [result for result in results if result is not None])
        return rows

    def _encode(self, model: TrainedModel, image_task: ImageTask, benchmark: Benchmark, with_text: bool) -> Features:
        began = time.perf_counter()
        features = extract_benchmark(
            model.encoder.for_task(image_task),
            benchmark.shards,
            model.tokenizer if with_text else None,
            model.image_size,
            self._settings.batch_size,
            self._settings.device,
            benchmark.split,
        )
        what = f"{len(features.row_N)} images" + f" and {len(features.captions)} captions" * with_text
        seconds = time.perf_counter() - began
        say(f"{self._candidate.name} on {benchmark.title}: {what} encoded in {seconds:.1f} s")
        return features

    def _answer(
        self, features: Features, question: Question, records: Records, rows: dict[Question, Row]
    ) -> TaskResult | None:
        """Ranks, tells and records one question; what was ranked is only kept where a report wants it."""
        kind, way = question
        task = TASKS[kind](features)
        assert task is not None  # `choose_tasks` saw to it
        began = time.perf_counter()
        result = score_task(task, way)
        row = records.row(kind, way, result.metrics, len(task.gallery_G), time.perf_counter() - began)
        rows[question] = row
        if distributed.rank() == 0:
            records.write(row)
        say(f"{_title(row)}: {_numbers(row)}")
        return result if self._settings.keep_sections else None

    def _keep(self, benchmark: Benchmark, features: Features, results: list[TaskResult]) -> None:
        """What a report shows."""
        model = self._model
        if self._settings.keep_sections and model is not None and distributed.rank() == 0:
            parts = (model.encoder, model.tokenizer, model.image_size)
            section = Section(benchmark.title, benchmark.shards, features, results, self._candidate.name, *parts)
            self.found.sections.append(section)

    def _compare(self, now: Row, before: Row | None) -> None:
        if before is not None and now.metrics != before.metrics:
            self.found.notes.append(
                f"{_title(now)}: other numbers than those recorded on {before.scored[:10]}, which they replace; "
                "another machine or library computes features to other last digits"
            )


def _image_features(model: TrainedModel) -> dict[ImageTask, tuple[TaskKind, ...]]:
    """The tasks of each kind of image features that the model has."""
    if model.encoder.has_i2i_token:
        return {"t2i": ("t2i", "i2t"), "i2i": ("i2i",)}
    return {"t2i": tuple(TASKS)}


def _title(row: Row) -> str:
    return f"{row.model} on {row.benchmark} ({row.split}), {row.task}, {row.ranked_by}"


def _numbers(row: Row) -> str:
    return f"R1 {row.metrics['R1']:.1f}, mAP {row.metrics['mAP']:.1f}"
