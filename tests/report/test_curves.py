"""Curves go through the numbers of the table, and their plot through honest axes."""

import io

import pytest
import torch
from PIL import Image

from reid_dist.evaluation.ranking import QueryRanks, Retrieval, rank_queries, summarise
from reid_dist.report.curves import MOST_RANKS, Curve, curve_of, draw_curves
from reid_dist.report.figures import new_axes, percent_axis, png

pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")


def random_ranks(gallery: int = 30) -> QueryRanks:
    make = torch.Generator().manual_seed(gallery)
    query_QD, gallery_GD = torch.randn(25, 4, generator=make), torch.randn(gallery, 4, generator=make)
    pid_Q, pid_G = torch.randint(0, 9, (25,), generator=make), torch.randint(0, 7, (gallery,), generator=make)
    return rank_queries(Retrieval(query_QD, gallery_GD, pid_Q, pid_G))


@pytest.mark.parametrize("gallery", [7, 30])
def test_a_curve_agrees_with_the_metrics(gallery: int) -> None:
    ranks = random_ranks(gallery)
    metrics = summarise(ranks)
    assert metrics["skipped"] > 0
    curve = curve_of(ranks, "model")
    assert [curve.cmc_K[k - 1] for k in (1, 5, 10)] == [metrics[f"R{k}"] for k in (1, 5, 10)]
    assert curve.mean_ap == metrics["mAP"]
    first = [rank for rank in ranks.first_Q.tolist() if rank]
    expected = [100 * sum(rank <= k for rank in first) / len(first) for k in range(1, MOST_RANKS + 1)]
    assert curve.cmc_K == pytest.approx(expected)
    assert len(curve.precision_R) == 11
    assert all(a >= b for a, b in zip(curve.precision_R, curve.precision_R[1:], strict=False))
    # No hit comes before the first, and at full recall the precision is the inverse negative penalty.
    assert curve.precision_R[0] >= metrics["R1"] and curve.precision_R[-1] == pytest.approx(metrics["mINP"])


def test_the_plot_is_a_picture_and_always_the_same() -> None:
    lines = [curve_of(random_ranks(), r"$\frac{$ <b>"), Curve("none", [0.0] * MOST_RANKS, [0.0] * 11, 0.0)]
    data = draw_curves("a_b (test): $ 5 %", lines * 5)
    assert data == draw_curves("a_b (test): $ 5 %", lines * 5)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert "Software" not in image.info  # another version of matplotlib need not give other bytes
        assert image.format == "PNG" and image.width > 900


def test_percent_is_shown_from_nothing_to_all() -> None:
    figure, (axis,) = new_axes(3, 3, 1)
    axis.plot([1, 2], [45, 46])
    percent_axis(axis, "y")
    assert axis.get_ylim() == (0, 100)
    assert png(figure)[:4] == b"\x89PNG"
