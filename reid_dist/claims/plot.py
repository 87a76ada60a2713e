"""The plot of all comparisons, by matplotlib (`pip install "reid_dist[plot]"`)."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reid_dist.claims.results import DECIDING
from reid_dist.claims.verdict import ERRORS

_COLOURS = {"supported": "#1f6f8b", "contradicted": "#b5452c", "within noise": "#999999"}


def plot_claims(results: dict[str, Any], path: Path) -> None:
    """A panel for each claim: comparisons as mean ± 2 standard errors with single seeds, coloured by verdict.

    Args:
        results: of `results.collect`.
        path: of the picture; its ending is the format.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")  # no display
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    claims = {
        claim["name"]: [row for group in claim["settings"].values() for row in group["rows"]]
        for claim in results["claims"]
    }
    heights = [1 + len(rows) for rows in claims.values()]
    figure, axes = pyplot.subplots(
        len(claims), 1, figsize=(9, 1.5 + 0.25 * sum(heights)), height_ratios=heights, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (axis,), (name, rows) in zip(axes, claims.items(), strict=True):
        _panel(axis, name, rows)
    axes[-1][0].set_xlabel(f"{DECIDING} difference; bars: mean ± {ERRORS:g} standard errors; ticks: seeds")
    marks = [pyplot.Line2D([], [], marker="o", color=colour, label=verdict) for verdict, colour in _COLOURS.items()]
    figure.legend(handles=marks, loc="outside upper right", ncols=len(marks))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, name: str, rows: Sequence[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        judged = row[DECIDING]
        colour = _COLOURS[judged["verdict"]]
        axis.errorbar(judged["mean"], place, xerr=ERRORS * (judged["error"] or 0.0), fmt="o", color=colour, capsize=3)
        axis.plot(judged["values"], [place] * len(judged["values"]), "|", color=colour, alpha=0.6)
    labels = [f"{row['better']} - {row['worse']} ({row['task']})" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylim(len(rows) - 0.3, -0.7)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(name, loc="left", fontsize=9)
