"""The benchmark of search on three people: features once, rows for both kinds of query, recall against a loop."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from reid_dist.benchmarks import search
from reid_dist.errors import UserError
from reid_dist.search import lists
from tests.search.conftest import make_export


def options(folder: Path, **changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    words = ["--json", folder / "rows.json", "--run", folder / "run", "--cache", folder / "cache", "--queries", 5]
    words += [word for name, value in changes.items() for word in (f"--{name}", value)]
    return parser.parse_args([str(word) for word in words])


def test_features_are_made_once_and_rows_say_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "_PART", 3)
    monkeypatch.setattr(search, "SHOTS", 5)
    make_export(tmp_path / "run")
    search.run(options(tmp_path, vectors=20))
    monkeypatch.setattr(search, "_encode", lambda *_: pytest.fail("the features are in the cache"))
    search.run(options(tmp_path, vectors=20))
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["query"]) for row in found["rows"]] == [
        (method, kind) for kind in ("image", "text") for method in ("index", "flat fp32")
    ]
    for row in found["rows"]:
        assert row["vectors"] == 20 and row["recall_at_10"] == 1 and row["latency_ms_p50"] > 0
        assert row["bytes_per_photograph"] >= row["bytes_per_vector"] >= 16 * (2 if row["method"] == "index" else 4)
    assert found["settings"]["worlds"] == 2 and "recall@10" in capsys.readouterr().out
    parts = sorted((tmp_path / "cache").rglob("*.npz"))
    with np.load(parts[0]) as one, np.load(parts[1]) as two:
        assert one["gallery"].shape == (12, 16) and one["image"].shape == (3, 16) == one["text"].shape
        assert not np.array_equal(one["gallery"], two["gallery"])
    assert not list((tmp_path / "cache").rglob("world*"))  # no picture stays


def test_recall_counts_what_a_loop_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "FLAT_LIMIT", 400)
    monkeypatch.setattr(search, "_BLOCK", 130)
    rng = np.random.default_rng(0)
    gallery_ND, query_QD = (rng.standard_normal((count, 8)).astype(np.float32) for count in (500, 6))
    best = [sorted(gallery_ND @ query_D, reverse=True)[9] for query_D in query_QD]
    np.testing.assert_allclose(search._tenth(gallery_ND, query_QD), best, rtol=1e-6)
    chosen = [list(rng.choice(500, 10, replace=False)) for _ in query_QD]
    answers = iter([*chosen, *chosen])
    measured = search._measured(lambda _: next(answers), gallery_ND, query_QD, np.array(best))
    right = sum(
        len(set(rows) & set(np.argsort(-(gallery_ND @ query_D))[:10].tolist()))
        for rows, query_D in zip(chosen, query_QD, strict=True)
    )
    assert measured["recall_at_10"] == round(right / 60, 4) and 0 <= right < 60


def test_wrong_options_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vectors 0: must be above 0"):
        search.run(options(tmp_path, vectors=0))
    with pytest.raises(UserError, match="no exported model"):
        search.run(options(tmp_path))
    make_export(tmp_path / "run")
    with pytest.raises(UserError, match=r"shards\.world: .*level"):
        search.run(options(tmp_path, level="impossible"))
