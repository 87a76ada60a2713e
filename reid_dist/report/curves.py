"""Cumulated matches and precision over recall of a task, as numbers and as a plot.

Shape suffixes: Q queries, K ranks, R points of recall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reid_dist.evaluation.ranking import QueryRanks
from reid_dist.report.figures import COLOURS, STROKES, name_axes, new_axes, percent_axis, png

MOST_RANKS = 20
_LONGEST = 110  # characters of a label; of one longer than half of that, a row holds no second


@dataclass(frozen=True)
class Curve:
    """What one model, perhaps re-ranked, scored in a task.

    Attributes:
        label: names it in the legend.
        cmc_K: share of the valid queries whose first positive is among the first 1..K, percent.
        precision_R: mean over them of the interpolated precision at recall 0, .1, ... 1, percent.
        mean_ap: percent.
    """

    label: str
    cmc_K: list[float]
    precision_R: list[float]
    mean_ap: float


def curve_of(ranks: QueryRanks, label: str, most: int = MOST_RANKS) -> Curve:
    """The curve of the queries that have a positive.

    Args:
        ranks: of every query, at least one of them with a positive.
        label: see `Curve`.
        most: K.
    """
    valid_Q = ranks.positives_Q > 0
    first_Q = ranks.first_Q[valid_Q]
    cmc_K = [_percent(first_Q <= k) for k in range(1, most + 1)]
    precision_R = [_percent(point_Q) for point_Q in ranks.precision_QR[valid_Q].unbind(1)]
    return Curve(label, cmc_K, precision_R, _percent(ranks.ap_Q[valid_Q]))


def _percent(value_Q: Tensor) -> float:
    """Mean as `summarise` takes it: exactly rounded, so the curve goes through the numbers of the table."""
    return 100.0 * math.fsum(value_Q.to(torch.float64).tolist()) / len(value_Q)


def draw_curves(title: str, curves: Sequence[Curve]) -> bytes:
    """A PNG: cumulated matches on the left, precision over recall on the right, both from 0 to 100 %."""
    labels = [f"{curve.label[:_LONGEST]}: R1 {curve.cmc_K[0]:.1f}, mAP {curve.mean_ap:.1f}" for curve in curves]
    columns = 2 if max(map(len, labels)) <= _LONGEST // 2 else 1
    rows = math.ceil(len(curves) / columns)
    figure, (left, right) = new_axes(9.5, 4.1 + 0.22 * rows, 2)
    for place, curve in enumerate(curves):
        look = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": STROKES[place % len(STROKES)],
            "linewidth": 2.0,
            "markersize": 4.5,
        }
        ranks = range(1, len(curve.cmc_K) + 1)
        left.plot(ranks, curve.cmc_K, marker="o", label=labels[place], clip_on=False, **look)
        recall = [100.0 * point / (len(curve.precision_R) - 1) for point in range(len(curve.precision_R))]
        right.plot(recall, curve.precision_R, marker="o", clip_on=False, **look)
    _name_axes(left, right)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
    return png(figure)


def _name_axes(left: Any, right: Any) -> None:
    name_axes(left, "Queries with a right answer among the first k", "k", "% of queries")
    left.set_xlim(0.5, MOST_RANKS + 0.5)
    left.set_xticks([1, 5, 10, 15, 20])
    name_axes(right, "Precision over recall, interpolated", "recall, %", "precision, % (mean over queries)")
    for axis in (left, right):
        percent_axis(axis, "y")
    percent_axis(right, "x")
