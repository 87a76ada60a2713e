"""The evaluation that a person asks for: everything that can be wrong is looked at before a model is built."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reid_dist import distributed
from reid_dist.engine import prepare_environment
from reid_dist.errors import UserError
from reid_dist.evaluate.benchmarks import Benchmark, choose_tasks, open_sets
from reid_dist.evaluate.candidates import Candidate, open_candidates
from reid_dist.evaluate.results import as_json
from reid_dist.evaluate.scoring import Scores, Settings, score_candidate
from reid_dist.evaluate.selection import Criterion, Selection, parse_criterion, select, validation_benchmarks
from reid_dist.evaluate.tables import as_text, matrix_tables, score_tables, seed_means, seed_table, selection_table
from reid_dist.evaluation.benchmark import TaskKind
from reid_dist.evaluation.reranking.choice import Reranking, parse_reranking
from reid_dist.files import write_results
from reid_dist.metrics import say
from reid_dist.report.document import Table
from reid_dist.report.page import require_page, write_page
from reid_dist.revision import commit

DATA_ROOT = "data/shards"


@dataclass(frozen=True)
class Request:
    """What is asked; see `launch/evaluate.py --help`.

    Attributes:
        runs: folders of runs, stages or exports.
        benchmarks: names below `data`, folders or addresses.
        data: folder or address of shard sets; None: where the first run read its own.
        split: of the benchmarks.
        tasks: none: all that a benchmark allows.
        rerank: re-rankings as `parse_reranking` reads them.
        select: TASK.METRIC that chooses one of the runs on val; None: all are scored.
        allow_overlap: score although training data overlap with a benchmark.
        again: score what is recorded too.
        batch_size: images encoded at a time on each rank.
        json: file for the results.
        report: folder for the report.
    """

    runs: Sequence[Path]
    benchmarks: Sequence[str]
    data: str | None = None
    split: Literal["test", "val"] = "test"
    tasks: Sequence[TaskKind] = ()
    rerank: Sequence[str] = ()
    select: str | None = None
    allow_overlap: bool = False
    again: bool = False
    batch_size: int = 64
    json: Path | None = None
    report: Path | None = None


@dataclass
class _Checked:
    """A request whose every part is there."""

    candidates: list[Candidate]
    benchmarks: list[Benchmark]
    rerankings: list[Reranking]
    criterion: Criterion | None
    validation: list[Benchmark]
    notes: list[str]


def evaluate(request: Request) -> Scores:
    """Scores and tells. A collective: every rank that the launcher started calls it.

    Raises:
        UserError: wrong input, before any scoring where it can be known.
        OSError: a full disk and the like.
    """
    began = time.perf_counter()
    checked = _check(request)
    device = prepare_environment()
    distributed.initialize(device)
    settings = Settings(checked.rerankings, request.batch_size, device, request.again, request.report is not None)
    selection, scores = None, Scores(notes=checked.notes)
    chosen = checked.candidates
    if checked.criterion is not None:
        selection = _select(checked, checked.criterion, settings)
        chosen = [each for each in chosen if each.name == selection.chosen]
    for candidate in chosen:
        scores.add(score_candidate(candidate, checked.benchmarks, settings))
    if distributed.rank() == 0:
        # No barrier behind it: a report may take longer than ranks wait for one another, and nothing follows.
        _tell(request, checked, scores, selection, began)
    return scores


def _check(request: Request) -> _Checked:
    """Opens everything; nothing is written and no device touched."""
    rerankings = list(dict.fromkeys(parse_reranking(text) for text in request.rerank))
    if request.batch_size < 1:
        raise UserError(f"--batch-size {request.batch_size}: at least 1 image")
    _check_places(request)
    criterion = None if request.select is None else _check_selection(request.select, request)
    candidates = open_candidates(request.runs, request.data)
    root = request.data or next((each.root for each in candidates if each.root), DATA_ROOT)
    sets = open_sets(request.benchmarks, root)
    validation = [] if criterion is None else validation_benchmarks(sets, criterion)
    benchmarks = choose_tasks(sets, request.split, request.tasks)
    notes = _overlap_notes(candidates, benchmarks, request.allow_overlap)
    return _Checked(candidates, benchmarks, rerankings, criterion, validation, notes)


def _check_selection(text: str, request: Request) -> Criterion:
    criterion = parse_criterion(text)
    wrong = "leave out --split val" if request.split == "val" else ""
    wrong = wrong or ("name several runs or stages" if len(request.runs) < 2 else "")
    if wrong:
        raise UserError(f"--select {text}: it chooses one of several RUNs on val, to score that one on test; {wrong}")
    return criterion


def _check_places(request: Request) -> None:
    """Refuses, before hours of scoring, a place where nothing can be written."""
    if request.json is not None and request.json.is_dir():
        raise UserError(f"--json {request.json}: is a folder; name a file")
    for option, path in (("--json", request.json), ("--report", request.report)):
        parent = None if path is None else next(folder for folder in path.absolute().parents if folder.exists())
        if parent is not None and not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise UserError(f"{option} {path}: nothing can be written in {parent}; name another place")
    if request.report is not None:
        require_page(request.report)


def _overlap_notes(candidates: Sequence[Candidate], benchmarks: Sequence[Benchmark], allowed: bool) -> list[str]:
    """What a reader of the scores must know of the training data.

    Raises:
        UserError: a benchmark asks for what a model was trained on.
    """
    notes: list[str] = []
    not_compared: dict[str, list[str]] = {}
    for candidate in candidates:
        lines = candidate.training.overlap([benchmark.shards for benchmark in benchmarks])
        if lines and not allowed:
            raise UserError(f"{candidate.name}: {'; '.join(lines)}; --allow-overlap scores it all the same")
        notes += [f"{candidate.name}: OVERLAP allowed: {line}" for line in lines]
        for unknown in candidate.training.unknown:
            not_compared.setdefault(unknown, []).append(candidate.name)
    notes += [
        f"{', '.join(names)}: overlap with the benchmarks was not compared for {unknown}"
        for unknown, names in not_compared.items()
    ]
    return notes


def _select(checked: _Checked, criterion: Criterion, settings: Settings) -> Selection:
    plain = Settings([], settings.batch_size, settings.device, settings.again)
    rows = [row for each in checked.candidates for row in score_candidate(each, checked.validation, plain).rows]
    selection = select(rows, criterion)
    say("\n" + as_text(selection_table(selection)) + "\n")
    return selection


def _tell(request: Request, checked: _Checked, scores: Scores, selection: Selection | None, began: float) -> None:
    """Tables for people, and the files that were asked for."""
    means = seed_means(checked.candidates, scores.rows) if selection is None else []
    more = [*seed_table(means), *matrix_tables(checked.candidates, checked.benchmarks, scores.rows)]
    for table in (*score_tables(scores.rows), *more):
        say("\n" + as_text(table))
    for note in scores.notes:
        say(f"note: {note}")
    if request.report is not None:
        _write_report(request.report, checked, scores, selection, more)
        say(f"written: {request.report}")
    if request.json is not None:
        seconds = time.perf_counter() - began
        results = as_json(checked.candidates, checked.benchmarks, scores.rows, means, selection, scores.notes, seconds)
        write_results(request.json, results)
        say(f"written: {request.json}")


def _write_report(
    folder: Path, checked: _Checked, scores: Scores, selection: Selection | None, tables: Sequence[Table]
) -> None:
    chosen = [] if selection is None else [selection_table(selection)]
    about = {f"weights of {each.name}": each.manifest["sha256"] for each in checked.candidates}
    about |= {"commit": commit() or "unknown", "command": " ".join(sys.argv)}
    about |= {f"note {number}": note for number, note in enumerate(scores.notes, start=1)}
    names = ", ".join(dict.fromkeys(row.benchmark for row in scores.rows))
    write_page(folder, f"Evaluation on {names}", scores.sections, [*chosen, *tables], about)
