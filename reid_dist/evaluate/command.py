"""The evaluation that a person asks for: everything that can be wrong is looked at before a model is built."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from reid_dist.evaluate.tables import (
    matrix_tables,
    score_tables,
    seed_means,
    seed_notes,
    seed_table,
    selection_table,
)
from reid_dist.evaluation.benchmark import TaskKind
from reid_dist.evaluation.reranking.choice import Reranking, parse_reranking
from reid_dist.files import write_results
from reid_dist.metrics import say
from reid_dist.report.document import as_text
from reid_dist.report.page import RESULTS_NAME, Page, require_page
from reid_dist.revision import commit

DATA_ROOT = "data/shards"
PATIENCE_S = 2 * 3600.0  # of the other ranks, while rank 0 draws a section of a report


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
        report: folder for the report; it shows rankings, so that everything is scored again.
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
    distributed.initialize(device, **({} if request.report is None else {"timeout_s": PATIENCE_S}))
    settings = Settings(checked.rerankings, request.batch_size, device, request.again)
    selection, chosen = None, checked.candidates
    if checked.criterion is not None:
        selection = _select(checked, checked.criterion, settings)
        chosen = [each for each in chosen if each.name == selection.chosen]
    page = None if request.report is None or distributed.rank() != 0 else Page(request.report)
    settings = replace(settings, again=request.again or request.report is not None)
    with page or nullcontext():
        scores = _score(chosen, checked.benchmarks, settings, page)
        scores.notes = [*checked.notes, *scores.notes]
        if distributed.rank() == 0:  # no barrier behind it: nothing follows that the others could wait for
            _tell(request, checked, scores, selection, began, page)
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
    if request.json is not None and os.path.isdir(request.json):
        raise UserError(f"--json {request.json}: is a folder; name a file")
    for option, path in (("--json", request.json), ("--report", request.report)):
        if path is not None:
            _check_place(option, path)
    if request.report is not None:
        require_page(request.report)
        json, report = request.json and request.json.resolve(), request.report.resolve()
        if json is not None and report in (json, *json.parents) and json != report / RESULTS_NAME:
            raise UserError(f"--json {request.json}: is in the report, which has its own {RESULTS_NAME}; leave it out")


def _check_place(option: str, path: Path) -> None:
    folder, name = os.path.split(path.absolute())
    try:
        os.stat(os.path.join(folder, f".{name}.partial-{2**22}"))  # longer than all that it is called meanwhile
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{option} {path}: the name is too long; name another place") from None
    parent = next((folder for folder in path.absolute().parents if os.path.exists(folder)), path)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"{option} {path}: nothing can be written in {parent}; name another place")


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


def _score(
    candidates: Sequence[Candidate], benchmarks: Sequence[Benchmark], settings: Settings, page: Page | None = None
) -> Scores:
    """Rows of all, and on the page what they are made of; one benchmark of one model is in memory at a time."""
    scores = Scores()
    for candidate in candidates:
        for section in score_candidate(candidate, benchmarks, settings, scores):
            if page is not None:
                page.add(section)
            del section  # before the next one is made
    return scores


def _select(checked: _Checked, criterion: Criterion, settings: Settings) -> Selection:
    plain = replace(settings, rerankings=[])
    selection = select(_score(checked.candidates, checked.validation, plain).rows, criterion)
    say("\n" + as_text(selection_table(selection)) + "\n")
    return selection


def _tell(
    request: Request, checked: _Checked, scores: Scores, selection: Selection | None, began: float, page: Page | None
) -> None:
    """Tables for people, and the files that were asked for."""
    means = []
    if selection is None:
        means = seed_means(checked.candidates, scores.rows)
        scores.notes += seed_notes(checked.candidates)
    tables = [*score_tables(scores.rows), *seed_table(means)]
    tables += matrix_tables(checked.candidates, checked.benchmarks, scores.rows)
    for table in tables:
        say("\n" + as_text(table))
    for note in scores.notes:
        say(f"note: {note}")
    seconds = time.perf_counter() - began
    results = as_json(checked.candidates, checked.benchmarks, scores.rows, means, selection, scores.notes, seconds)
    if page is not None:
        chosen = [] if selection is None else [selection_table(selection)]
        names = ", ".join(dict.fromkeys(row.benchmark for row in scores.rows))
        page.finish(f"Evaluation on {names}", [*chosen, *tables], _about(checked, scores), results)
        say(f"written: {request.report}")
    if request.json is not None:
        write_results(request.json, results)
        say(f"written: {request.json}")


def _about(checked: _Checked, scores: Scores) -> dict[str, str]:
    about = {f"weights of {each.name}": each.manifest["sha256"] for each in checked.candidates}
    about |= {"commit": commit() or "unknown", "command": " ".join(sys.argv)}
    return about | {f"note {number}": note for number, note in enumerate(scores.notes, start=1)}
