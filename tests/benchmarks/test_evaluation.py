"""The ranking benchmark at a small size: what it compares must agree, and its sort must be right."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.benchmark import main
from reid_dist.benchmarks import evaluation
from reid_dist.benchmarks.evaluation import make_retrieval, sorted_at_once, sorted_in_a_loop
from reid_dist.evaluation.ranking import Retrieval, rank_queries

SMALL = ["--queries", "600", "--gallery", "900", "--identities", "60", "--features", "16", "--rounds", "1"]


def test_every_row_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    streamed = ["--streamed", "5000", "--streamed-queries", "40"]
    assert main(["evaluation", "--json", str(out), *SMALL, "--rerank", *streamed]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["implementation"], row["queries"], row["gallery"]) for row in rows] == [
        ("ours", 600, 900),
        ("similarity product alone", 600, 900),
        ("argsort, 512 queries at once", 512, 900),
        ("argsort, 512 queries in a loop", 512, 900),
        ("ours, neighbour Jaccard (5, 0.05)", 600, 900),
        ("ours, k-reciprocal (20, 6, 0.3)", 600, 900),
        ("ours, gallery streamed from a file", 40, 5000),
    ]
    shown = capsys.readouterr().out
    for row in rows:
        assert f"| {row['implementation']} | {row['queries']:,} |" in shown
        assert row["seconds"] > 0 and row["seconds_per_query"] == pytest.approx(
            row["seconds"] / row["queries"], abs=1e-3
        )
        assert 0 <= row["extra_bytes"] < 100e6


def test_both_sorts_are_the_metrics() -> None:
    task = make_retrieval(150, 400, 30, 8, cameras=3)
    ranks = rank_queries(task)
    valid = ranks.positives_Q > 0
    for answer in (sorted_at_once(task), sorted_in_a_loop(task)):
        assert answer.ap == pytest.approx(ranks.ap_Q[valid].numpy(), abs=1e-9)
        assert np.array_equal(answer.first, ranks.first_Q[valid].numpy())


def test_a_wrong_ranking_stops_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_cameras(task: Retrieval) -> object:
        return rank_queries(Retrieval(task.query_QD, task.gallery_GD, task.query_pid_Q, task.gallery_pid_G))

    monkeypatch.setattr(evaluation, "rank_queries", without_cameras)
    with pytest.raises(RuntimeError, match="differ"):
        main(["evaluation", "--json", str(tmp_path / "rows.json"), *SMALL])
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--queries", "0"], "--queries 0: must be at least 1"),
        (["--streamed", "10"], "--streamed 10: must be 0, or at least 8 entries"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluation", "--json", str(tmp_path / "rows.json"), *options]) == 2
    assert problem in capsys.readouterr().err
