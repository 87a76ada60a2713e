"""One model on its benchmarks: what is recorded is read, the rest is encoded once and ranked task by task."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from reid_dist.report.section import Section
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
    """

    rerankings: Sequence[Reranking]
    batch_size: int
    device: torch.device
    again: bool = False


@dataclass
class Scores:
    """What was found.

    Attributes:
        rows: in the order asked.
        notes: what a reader of the rows should know.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def score_candidate(
    candidate: Candidate, benchmarks: Sequence[Benchmark], settings: Settings, found: Scores
) -> Iterator[Section]:
    """Adds a model's rows to what was found. A collective with the same rows on every rank.

    Returns:
        What a report shows of all that was not read; of each, the features are gone when the next one is encoded.

    Raises:
        UserError: an image does not decode, or the features hold nan or inf.
    """
    scorer = _Scorer(candidate, settings, found)
    for benchmark in benchmarks:
        yield from scorer.score(benchmark)


class _Scorer:
    """One model; loaded when the first score is not recorded."""

    def __init__(self, candidate: Candidate, settings: Settings, found: Scores) -> None:
        self._found = found
        self._candidate, self._settings = candidate, settings
        self._model: TrainedModel | None = None

    def score(self, benchmark: Benchmark) -> Iterator[Section]:
        """Adds the rows of a benchmark to what was found."""
        settings = self._settings
        questions: list[Question] = [(task, way) for task in benchmark.tasks for way in (None, *settings.rerankings)]
        records = Records(self._candidate, benchmark)
        recorded = {question: records.read(*question) for question in questions}
        # Rank 0's view counts: on a network file system the others may not see its files yet.
        known: dict[Question, Row | None] = distributed.broadcast_object(recorded)
        read = {} if settings.again else {each: row for each, row in known.items() if row}
        for row in read.values():
            say(f"{_title(row)}: {_numbers(row)} [recorded on {row.scored[:10]}, not scored again; --again does]")
        fresh: dict[Question, Row] = {}
        for image_task, own in self._by_features([each for each in questions if each not in read]):
            yield self._section(image_task, benchmark, own, records, fresh)
        for question, row in fresh.items():
            self._compare(row, known[question])
        self._found.rows += [(read | fresh)[question] for question in questions]
        if records.problem and records.problem not in self._found.notes:
            self._found.notes.append(records.problem)

    def _by_features(self, questions: Sequence[Question]) -> Iterator[tuple[ImageTask, list[Question]]]:
        """The questions of each kind of image features that they need."""
        for image_task, tasks in _image_features(self._loaded()).items() if questions else ():
            own = [(task, way) for task, way in questions if task in tasks]
            if own:
                yield image_task, own

    def _section(
        self,
        image_task: ImageTask,
        benchmark: Benchmark,
        questions: Sequence[Question],
        records: Records,
        rows: dict[Question, Row],
    ) -> Section:
        """Encodes a benchmark once and ranks."""
        model = self._loaded()
        features = self._encode(model, image_task, benchmark, any(task != "i2i" for task, _ in questions))
        results = [self._answer(features, question, records, rows) for question in questions]
        about = self._candidate.name, model.encoder, model.tokenizer, model.image_size
        return Section(benchmark.title, benchmark.shards, features, results, *about)

    def _loaded(self) -> TrainedModel:
        if self._model is None:
            self._model = TrainedModel(self._candidate.export, self._settings.device)
        return self._model

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
    ) -> TaskResult:
        """Ranks, tells and records one question."""
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
        return result

    def _compare(self, now: Row, before: Row | None) -> None:
        if before is not None and now.metrics != before.metrics:
            self._found.notes.append(
                f"{_title(now)}: other numbers than those recorded on {before.scored[:10]}, which they replace; "
                "another batch size, kind of device or library computes features to other last digits"
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
