"""The report of an evaluation as a folder: report.html, report.md, results.json and the pictures.

A `Page` is for one process; other ranks have nothing to do with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import TaskKind
from reid_dist.files import flush, replace_folder, write_results
from reid_dist.report.curves import Curve, curve_of, draw_curves
from reid_dist.report.document import Block, Heading, Table, as_html, as_markdown
from reid_dist.report.figures import require_plot
from reid_dist.report.section import TASK_NAMES, Album, Section, section_blocks

HTML_NAME, MARKDOWN_NAME, RESULTS_NAME, PICTURES = "report.html", "report.md", "results.json", "pictures"
COSINE = "cosine"


def require_page(folder: Path) -> None:
    """Whether a report can be written, to be asked before hours of scoring.

    Raises:
        UserError: matplotlib is missing, or the folder holds something else than an earlier report.
    """
    require_plot()
    if folder.is_dir():
        found = {path.name for path in folder.iterdir()}
        if found and not (HTML_NAME in found and found <= {HTML_NAME, MARKDOWN_NAME, RESULTS_NAME, PICTURES}):
            raise UserError(f"--report {folder}: holds something else than a report; name a new or an empty folder")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"--report {folder}: is no folder; name a new or an empty one")


class Page:
    """A report that grows section by section, beside its place; `finish` puts it there in place of an earlier one.

    A context: one that is left unfinished leaves nothing.

    Args:
        folder: of the report.

    Raises:
        UserError: see `require_page`.
    """

    def __init__(self, folder: Path) -> None:
        require_page(folder)
        self._folder = folder.resolve()  # a link stays one
        self._partial = self._folder.with_name(f".{self._folder.name}.partial-{os.getpid()}")
        self._album = Album(self._partial, PICTURES)
        self._curves: dict[tuple[str, TaskKind], list[Curve]] = {}
        self._details: list[Block] = []

    def __enter__(self) -> Page:
        shutil.rmtree(self._partial, ignore_errors=True)
        (self._partial / PICTURES).mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, section: Section) -> None:
        """Draws a section; nothing of it is kept but numbers and pictures.

        Raises:
            UserError: an image does not decode.
        """
        for result in section.results:
            how = COSINE if result.reranking is None else result.reranking.label
            label = ", ".join(part for part in (section.model, how) if part)
            self._curves.setdefault((section.name, result.kind), []).append(curve_of(result.ranks, label))
        self._details += section_blocks(self._album, section)

    def finish(self, title: str, tables: Sequence[Table], about: Mapping[str, str], results: Mapping[str, Any]) -> None:
        """Writes the pages around the sections and gives the folder its name.

        Args:
            title: of the page.
            tables: of scores, shown first.
            about: what was measured and how, as names and values: weights, commit, seconds.
            results: for machines.
        """
        blocks: list[Block] = [Heading(2, "Results"), *tables]
        blocks.append(Table(("", ""), list(about.items()), title="What was measured", texts=2))
        blocks += [Heading(2, "Curves"), *(self._drawn(*key) for key in self._curves), *self._details]
        (self._partial / HTML_NAME).write_text(as_html(title, blocks), encoding="utf-8")
        (self._partial / MARKDOWN_NAME).write_text(as_markdown(title, blocks), encoding="utf-8")
        write_results(self._partial / RESULTS_NAME, results)
        for path in (*self._partial.rglob("*"), self._partial / PICTURES):
            flush(path)
        replace_folder(self._partial, self._folder)

    def _drawn(self, name: str, kind: TaskKind) -> Block:
        heading, lines = f"{name}: {TASK_NAMES[kind]}", self._curves[name, kind]
        return self._album.keep(f"{name} {kind} curves", draw_curves(heading, lines), _told(heading, lines))


def _told(heading: str, lines: Sequence[Curve]) -> str:
    scores = "; ".join(f"{line.label}: Rank-1 {line.cmc_K[0]:.1f}, mAP {line.mean_ap:.1f}" for line in lines)
    return f"{heading}: cumulated matches and precision over recall. {scores}."
