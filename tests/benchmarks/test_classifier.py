"""`benchmark.py classifier`: its rows on real ranks, its file and its refusals."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist.benchmarks import classifier
from reid_dist.benchmarks.classifier import Case
from reid_dist.errors import UserError

ROOT = Path(__file__).parents[2]
CASE = Case(1, 50_000, None, rows=4, features=64, steps=1, threads=1)


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    classifier.add_arguments(parser)
    return parser.parse_args(["--json", "x.json", *options])


@pytest.mark.parametrize(("ranks", "rate"), [(1, None), (2, 1.0), (2, 0.25)])
def test_rows(run_ranks: Callable[..., list[Any]], ranks: int, rate: float | None) -> None:
    rows = run_ranks(ranks, classifier.measure, replace(CASE, ranks=ranks, rate=rate))
    row = rows[0]
    assert row["layout"] == ("dense" if rate is None else "sharded") and row["rate"] == (rate or 1)
    assert row["step_ms"] > 0 and row["processor_ms"] > 0
    kept = 3 * 50_000 * 64 * 4 / ranks
    assert 0.7 * kept < row["peak_bytes"] < 2.5 * kept + 2e7
    assert all(other == row for other in rows)  # the slowest rank's, on each


def test_both_steps_train_and_sharded_ones_do_what_dense_ones_do() -> None:
    case = Case(1, 40, None, rows=6, features=8, steps=1, threads=1)
    gradients = []
    for rate in (None, 1.0):
        torch.manual_seed(0)
        feature, label = torch.randn(6, 8, requires_grad=True), torch.randint(40, (6,))
        step = classifier._step(replace(case, rate=rate), torch.device("cpu"))
        for _ in range(300):
            step(feature, label)
        feature.grad = None
        step(feature, label)
        assert feature.grad is not None
        gradients.append(feature.grad)
    # From other first weights, which hardly matter at the end.
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


def test_cases() -> None:
    cases = classifier.choose_cases(parsed("--ranks", "1", "2", "2", "--identities", "10"))
    assert [(case.ranks, case.rate) for case in cases] == [(r, rate) for r in (1, 2) for rate in (None, 1.0, 0.1)]
    dense, sharded, sampled = (case.needed_bytes for case in cases[3:])
    assert sampled < sharded < dense / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be above 0"),
        (["--rates", "1.5"], "--rates 1.5: must be above 0 and at most 1"),
        (["--identities", "-5"], "--identities -5: must be above 0"),
        (["--json", "/"], "--json /: is a folder"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classifier.run(parsed(*options))


def test_command_lists_what_does_not_fit(tmp_path: Path) -> None:
    out = tmp_path / "classifier.json"
    line = [sys.executable, "launch/benchmark.py", "classifier", "--json", str(out), "--rates", "0.001", "--rows", "2"]
    # Dense that is 20 TB; of the sampled one's it would be 10.
    line += ["--identities", "300", "10000000000", "--features", "512", "--steps", "1"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["step_ms"] is None for row in rows] == [False, False, True, True]
    assert result.stdout.count("does not fit") == 2
