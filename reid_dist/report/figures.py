"""What all plots of the report share: matplotlib without a display, its colours, a PNG as bytes."""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any

from reid_dist.errors import UserError

# Okabe and Ito 2008: told apart by colour-blind people too; lines differ in their strokes as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STROKES = ("solid", "dashed", "dashdot", "dotted")
FAINT = "#777777"
_LOOK = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}


def require_plot() -> None:
    """Whether plots can be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots: matplotlib is missing: install the extra: pip install -e '.[plot]'")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches; it needs no pyplot, whose figures live until they are closed."""
    require_plot()
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    return figure_class(figsize=(width, height), layout="constrained", dpi=110)


def new_axes(width: float, height: float, columns: int, **how: Any) -> tuple[Any, list[Any]]:
    """A figure of so many inches, and axes in one row."""
    figure = new_figure(width, height)
    matplotlib: Any = importlib.import_module("matplotlib")
    with matplotlib.rc_context(_LOOK):
        return figure, list(figure.subplots(1, columns, squeeze=False, **how)[0])


def name_axes(axis: Any, title: str, x: str, y: str = "") -> None:
    """Title on the left, and what the axes are."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def png(figure: Any) -> bytes:
    """The figure as a PNG; the same bytes for the same figure. Its `$` and `_` are text and not formulas."""
    texts: Any = importlib.import_module("matplotlib.text").Text
    for text in figure.findobj(texts):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def percent_axis(axis: Any, which: str) -> None:
    """An axis from 0 to 100 %, whatever the values are."""
    getattr(axis, f"set_{which}lim")(0, 100)
    getattr(axis, f"set_{which}ticks")(range(0, 101, 20))
