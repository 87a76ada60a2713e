"""Pictures of the benchmarks' tables, by matplotlib (`pip install "reid_dist[plot]"`)."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError

_FORMATS = (".png", ".svg", ".pdf")
_OURS, _ROOF, _OTHERS = "#1f6f8b", "#999999", "#d9a441"


def check_plot(path: Path) -> None:
    """Whether a picture can be drawn, before anything is measured.

    Raises:
        UserError: matplotlib is missing, the ending is of no known format, or the folder cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('--plot: needs matplotlib; install it with pip install "reid_dist[plot]"')
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"--plot {path}: name a file that ends in {', '.join(_FORMATS)}")


def _figure(panels: int, height: float) -> Any:
    """(figure, axes of one column)."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")  # no display
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    return pyplot.subplots(panels, 1, figsize=(9, max(2.0, height) * panels), squeeze=False, layout="constrained")


def plot_kernel(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each cell: bars of the total time, with the memory beside them."""
    from reid_dist.benchmarks.kernel_peers import OURS, ROOF

    keys = ("op", "B", "K", "D", "dtype")
    cells = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows if row["total_ms"] is not None))
    figure, axes = _figure(len(cells) or 1, 3.2)
    for cell, (axis,) in zip(cells, axes, strict=False):
        shown = [row for row in rows if tuple(row[key] for key in keys) == cell and row["total_ms"] is not None]
        names = [f"{row['backend']} (no mask)" if row["mask"] == "none" else row["backend"] for row in shown]
        colours = [
            _OURS if n in OURS else _ROOF if n in ROOF.values() else _OTHERS for n in (r["backend"] for r in shown)
        ]
        bars = axis.barh(names, [row["least_total_ms"] for row in shown], color=colours)
        axis.bar_label(bars, [_memory(row) for row in shown], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel("forward and backward, least ms; extra memory beside it")
        axis.set_title(f"{cell[0]}  B={cell[1]} K={cell[2]} D={cell[3]} {cell[4]}")
    figure.savefig(path, dpi=120)


def _memory(row: dict[str, Any]) -> str:
    return "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:,.0f} MB"


def plot_queue(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel: times of each part of a step, by ranks and layout."""
    figure, ((axis,),) = _figure(1, 4.0)
    parts = ("gather_ms", "exposed_ms", "commit_ms", "attend_ms")
    width = 0.8 / len(parts)
    for number, part in enumerate(parts):
        places = [place + (number - len(parts) / 2) * width for place in range(len(rows))]
        axis.bar(places, [row[part] for row in rows], width, align="edge", label=part.replace("_ms", ""))
    axis.set_xticks(range(len(rows)), [f"{row['ranks']} ranks\n{row['layout']}" for row in rows])
    axis.set_yscale("log")
    axis.set_ylabel("ms of a step, slowest rank")
    axis.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=120)
