"""Plots of what `errors` computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reid_dist.report.errors import Difference, Group
from reid_dist.report.figures import COLOURS, FAINT, name_axes, new_axes, percent_axis, png

# More would be no plot any more; those that are shown are the worst.
MOST_CAMERAS = 30
# Of fewer queries one more or less moves the dot by five points.
LEAST_QUERIES = 20
_FIRST, _SECOND = COLOURS[0], COLOURS[1]


def camera_name(camid: int) -> str:
    """As the report calls a camera."""
    return "unknown" if camid < 0 else f"camera {camid}"


def draw_cameras(title: str, groups: Mapping[int, Group], pairs: Mapping[tuple[int, int], int]) -> bytes:
    """A PNG: scores by the camera of the query, and beside them whose cameras the wrong first answers are.

    Args:
        title: one line.
        groups: see `errors.by_camera`; not empty.
        pairs: see `errors.mistaken_cameras`.
    """
    shown = sorted(sorted(groups, key=lambda camid: groups[camid].mean_ap)[:MOST_CAMERAS])
    answers = sorted({camid for _, camid in pairs})
    height = 1.6 + 0.34 * max(3, len(shown))
    figure, (left, right) = new_axes(10.5, height, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(shown))
    _dots(
        left,
        [(places, [groups[c].rank1 for c in shown], "Rank-1"), (places, [groups[c].mean_ap for c in shown], "mAP")],
    )
    left.set_yticks(places, [f"{camera_name(camid)}  (n = {groups[camid].queries})" for camid in shown])
    left.set_ylim(len(shown) - 0.4, -0.6)
    name_axes(left, "Scores by the camera of the query", "%")
    _camera_matrix(right, shown, answers, pairs)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return png(figure)


def _dots(axis: Any, series: Sequence[tuple[Sequence[int], Sequence[float], str]]) -> None:
    """Two values a line, joined: filled circles and hollow squares."""
    (places, first, first_name), (_, second, second_name) = series
    axis.hlines(places, first, second, color="#bbbbbb", linewidth=1.5)
    axis.plot(first, places, "o", color=_FIRST, markersize=7, label=first_name, clip_on=False)
    axis.plot(
        second, places, "s", color=_SECOND, markersize=6, markerfacecolor="white", label=second_name, clip_on=False
    )
    percent_axis(axis, "x")
    axis.grid(axis="y", visible=False)


def _camera_matrix(
    axis: Any, shown: Sequence[int], answers: Sequence[int], pairs: Mapping[tuple[int, int], int]
) -> None:
    name_axes(axis, "Camera of the wrong first answer, % of row", "camera of the answer")
    axis.grid(visible=False)
    if not answers:
        axis.text(0.5, 0.5, "no first answer is wrong", transform=axis.transAxes, ha="center", color=FAINT)
        axis.set_xticks([])
        return
    table = [[pairs.get((asked, answer), 0) for answer in answers] for asked in shown]
    shares = [[100.0 * count / max(1, sum(row)) for count in row] for row in table]
    axis.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(answers)), ["?" if camid < 0 else str(camid) for camid in answers])
    axis.tick_params(left=False)
    if len(answers) <= MOST_CAMERAS // 2:
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                text = f"{share:.0f}" if sum(table[y]) else "-"
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if share > 60 else "white")


def draw_attributes(
    title: str, values: Mapping[str, Mapping[str, Group]], differences: Mapping[str, Difference], mistakes: int
) -> bytes:
    """A PNG: Rank-1 by the value of each attribute, and beside it what wrong first answers are wrong in.

    Args:
        title: one line.
        values: see `errors.by_attribute`; not empty.
        differences: see `errors.mistaken_attributes`.
        mistakes: of so many wrong first answers.
    """

    def asked_too_much(name: str) -> float:
        return -differences[name].mistaken / max(1e-9, differences[name].random) if name in differences else 0.0

    names = sorted(values, key=lambda name: (asked_too_much(name), name))
    figure, (left, right) = new_axes(11.5, 1.9 + 0.36 * len(names), 2, sharey=True)
    for place, name in enumerate(names):
        _values(left, place, {value: group for value, group in values[name].items() if group.queries >= LEAST_QUERIES})
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.set_ylim(len(names) - 0.4, -0.6)
    percent_axis(left, "x")
    name_axes(left, "Scores by what people look like", "Rank-1, %, of the queries with each value; extremes by name")
    _differences(right, names, differences, mistakes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    if differences:
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return png(figure)


def _values(axis: Any, place: int, groups: Mapping[str, Group]) -> None:
    """The values of one attribute on one line, the extremes by name."""
    if not groups:
        return
    ordered = sorted(groups, key=lambda value: groups[value].rank1)
    scores = [groups[value].rank1 for value in ordered]
    axis.hlines([place], scores[0], scores[-1], color="#bbbbbb", linewidth=1.5)
    axis.plot(scores, [place] * len(scores), "o", color=_FIRST, markersize=5.5, alpha=0.8, clip_on=False)
    ends = [(ordered[0], scores[0], "right", -6)]
    if len(ordered) > 1:
        ends.append((ordered[-1], scores[-1], "left", 6))
    for value, score, side, shift in ends:
        axis.annotate(
            value[:24], (score, place), (shift, 0), textcoords="offset points", ha=side, va="center", fontsize=8,
            color=FAINT, annotation_clip=False,
        )  # fmt: skip


def _differences(axis: Any, names: Sequence[str], differences: Mapping[str, Difference], mistakes: int) -> None:
    title = f"What {mistakes:,} wrong first answers are wrong in"
    name_axes(axis, title, "%, in which the person differs from the one asked for")
    known = [place for place, name in enumerate(names) if name in differences]
    if not known:
        axis.text(0.5, 0.5, "no first answer is wrong", transform=axis.transAxes, ha="center", color=FAINT)
        axis.set_xticks([])
        return
    found = [differences[names[place]] for place in known]
    mistaken, random = [each.mistaken for each in found], [each.random for each in found]
    _dots(axis, [(known, mistaken, "wrong first answers"), (known, random, "any wrong answer")])
