"""`benchmark.py queue`: its rows on real ranks, its file and its refusals."""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist.benchmarks import plot, queue
from reid_dist.benchmarks.queue import Case
from reid_dist.errors import UserError

ROOT = Path(__file__).parents[2]
CASE = Case(1, False, rows=6, size=101, features=16, dtype="bfloat16", steps=3, encoder_ms=1.0, threads=1)
TIMES = ("gather_ms", "least_gather_ms", "commit_ms", "encoder_ms", "attend_ms")


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    queue.add_arguments(parser)
    return parser.parse_args(["--json", "x.json", *options])


@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (2, False), (2, True)])
def test_rows(run_ranks: Callable[..., list[Any]], ranks: int, sharded: bool) -> None:
    case = Case(**(vars(CASE) | {"ranks": ranks, "sharded": sharded}))
    rows = run_ranks(ranks, queue.measure, case)
    row = rows[0]
    assert row["ranks"] == ranks and row["layout"] == ("sharded" if sharded else "replicated")
    assert all(row[name] > 0 for name in TIMES) and row["exposed_ms"] >= 0
    assert row["least_gather_ms"] <= row["gather_ms"]
    assert row["sent_bytes"] == (ranks - 1) * 6 * (2 * 16 * 2 + 4)
    slots = 51 if sharded else 101
    assert row["storage_bytes"] >= slots * (2 * 16 * 2 + 4)
    assert all(other[name] == row[name] for other in rows for name in TIMES)  # the slowest rank's, on each


def test_the_step_does_what_it_is_timed_for() -> None:
    step = queue._Step(CASE)
    step.gather()
    step.commit()
    image_KD, ids_K = step.queue.ring.keys("image")
    assert (ids_K[:6].long() == step._ids_B).all() and (ids_K[6:] == -1).all()
    assert torch.equal(image_KD[:6], step._image_BD.bfloat16())
    step.attend()
    assert step._anchors_BD.grad is not None and step._anchors_BD.grad.norm() > 0


def test_cases() -> None:
    cases = queue.choose_cases(parsed("--ranks", "1", "4", "4"))
    assert [(case.ranks, case.sharded) for case in cases] == [(1, False), (1, True), (4, False), (4, True)]
    assert all(case.threads >= 1 and case.size == 65536 for case in cases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be above 0"),
        (["--rows", "-1"], "--rows -1: must be above 0"),
        (["--encoder-ms", "nan"], "--encoder-ms nan: must be above 0"),
        (["--dtype", "int8"], "--dtype int8: not known; there are float32, bfloat16"),
        (["--size", "9999999999"], r"--size 9999999999: 1 replicas need about \d+ GB"),
        (["--json", "/"], "--json /: is a folder"),
        (["--json", "/proc/none/x.json"], "--json /proc/none/x.json: cannot be written"),
        (["--plot", "x.txt"], r"--plot.*(needs matplotlib|ends in .png)"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        queue.run(parsed(*options))


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "queue.json"
    line = [sys.executable, "launch/benchmark.py", "queue", "--json", str(out), "--ranks", "2", "--rows", "8"]
    line += ["--size", "300", "--features", "32", "--steps", "2", "--encoder-ms", "2"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    assert [(row["ranks"], row["layout"]) for row in written["rows"]] == [(2, "replicated"), (2, "sharded")]
    assert len(written["model"]["rows"]) == 9 and written["settings"]["size"] == 300 and written["machine"]
    assert "measured here" in result.stdout and "cost model, NOT measured" in result.stdout


def test_picture(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed (reid_dist[plot])")
    times = dict.fromkeys(("gather_ms", "exposed_ms", "commit_ms", "attend_ms"), 1.0)
    plot.plot_queue([{"ranks": 2, "layout": "sharded", **times}], tmp_path / "queue.png")
    assert (tmp_path / "queue.png").read_bytes().startswith(b"\x89PNG")
