"""The report of an evaluation as a folder: report.html, report.md and their pictures.

`write_page` is for one process; other ranks have nothing to do with it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import TaskKind, TaskResult
from reid_dist.evaluation.ranking import METRIC_KEYS
from reid_dist.files import flush, replace_folder
from reid_dist.report.curves import Curve, curve_of, draw_curves
from reid_dist.report.document import Block, Heading, Table, as_html, as_markdown
from reid_dist.report.figures import require_plot
from reid_dist.report.section import TASK_NAMES, Album, Section, section_blocks

__all__ = ["Section", "Table", "require_page", "write_page"]

HTML_NAME, MARKDOWN_NAME, PICTURES = "report.html", "report.md", "pictures"
COSINE = "cosine"
_PROTOCOL = (
    "Percent. Cosine in fp32, rectangular AP, ties against the model; image to image leaves out images of the query's "
    "person by the query's camera. Queries without a right answer are left out and counted as skipped; tied: share of "
    "queries for which a right and a wrong answer score exactly alike."
)


def require_page(folder: Path) -> None:
    """Whether a report can be written, to be asked before hours of scoring.

    Raises:
        UserError: matplotlib is missing, or the folder holds something else than an earlier report.
    """
    require_plot()
    if folder.is_dir():
        found = {path.name for path in folder.iterdir()}
        if found and not (HTML_NAME in found and found <= {HTML_NAME, MARKDOWN_NAME, PICTURES}):
            raise UserError(f"--report {folder}: holds something else than a report; name a new or an empty folder")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"--report {folder}: is no folder; name a new or an empty one")


def write_page(
    folder: Path,
    title: str,
    sections: Iterable[Section],
    tables: Sequence[Table] = (),
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes the report: whole under its name, or not at all; an earlier one is replaced.

    Args:
        folder: of the report.
        title: of the page.
        sections: taken one at a time, so that a generator need not hold the features of all benchmarks at once.
        tables: shown after the table of all results, for example the cross-domain matrix.
        about: what was measured and how, as names and values: weights, commit, seconds.

    Raises:
        UserError: see `require_page`; or an image does not decode.
    """
    require_page(folder)
    folder = folder.resolve()  # a link stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / PICTURES).mkdir(parents=True)
        blocks = _blocks(partial, sections, tables, about or {})
        (partial / HTML_NAME).write_text(as_html(title, blocks), encoding="utf-8")
        (partial / MARKDOWN_NAME).write_text(as_markdown(title, blocks), encoding="utf-8")
        for path in (*partial.rglob("*"), partial / PICTURES):
            flush(path)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _blocks(
    folder: Path, sections: Iterable[Section], tables: Sequence[Table], about: Mapping[str, str]
) -> list[Block]:
    """All of the page; the pictures are written meanwhile."""
    album = Album(folder, PICTURES)
    curves: dict[tuple[str, TaskKind], list[Curve]] = {}
    rows: list[list[str]] = []
    details: list[Block] = []
    for section in tqdm(sections, desc="report", unit="benchmark", disable=not sys.stderr.isatty(), leave=False):
        for result in section.results:
            how = COSINE if result.reranking is None else result.reranking.label
            label = ", ".join(part for part in (section.model, how) if part)
            curves.setdefault((section.name, result.kind), []).append(curve_of(result.ranks, label))
            rows.append(_row(section, result, how))
        details += section_blocks(album, section)
    results: list[Block] = [Heading(2, "Results"), *_tables(rows), *tables]
    if about:
        results.append(Table(("", ""), list(about.items()), title="What was measured", texts=2))
    drawn: list[Block] = [Heading(2, "Curves")]
    for (name, kind), lines in curves.items():
        heading = f"{name}: {TASK_NAMES[kind]}"
        drawn.append(album.keep(f"{name} {kind} curves", draw_curves(heading, lines), _told(heading, lines)))
    return [*results, *drawn, *details]


def _told(heading: str, lines: Sequence[Curve]) -> str:
    scores = "; ".join(f"{line.label}: Rank-1 {line.cmc_K[0]:.1f}, mAP {line.mean_ap:.1f}" for line in lines)
    return f"{heading}: cumulated matches and precision over recall. {scores}."


def _row(section: Section, result: TaskResult, how: str) -> list[str]:
    metrics = result.metrics
    numbers = [f"{metrics[key]:.1f}" for key in METRIC_KEYS]
    counts = [f"{int(metrics[key]):,}" for key in ("queries", "skipped")]
    names = [section.model, section.name, TASK_NAMES[result.kind], how]
    return [*names, *numbers, *counts, f"{len(result.task.gallery_G):,}", f"{metrics['tied']:.1f}"]


def _tables(rows: Sequence[Sequence[str]]) -> list[Table]:
    """All results, re-ranked ones in a table of their own; a single model is not named in each row."""
    head = ("model", "benchmark", "task", "ranked by", *METRIC_KEYS, "queries", "skipped", "gallery", "tied")
    first = 0 if len({row[0] for row in rows}) > 1 else 1
    parts = [("Scores", _PROTOCOL), ("Re-ranked scores", "Only rows of the same procedure and parameters compare.")]
    found = []
    for (title, note), reranked in zip(parts, (False, True), strict=True):
        shown = [row[first:] for row in rows if (row[3] != COSINE) == reranked]
        if shown:
            found.append(Table(head[first:], shown, title, note, texts=4 - first))
    return found
