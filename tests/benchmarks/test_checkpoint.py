"""`benchmark.py checkpoint`: its rows on real ranks, and its refusals."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.benchmarks import checkpoint
from reid_dist.benchmarks.checkpoint import WAYS, Case
from reid_dist.errors import UserError


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    checkpoint.add_arguments(parser)
    return parser.parse_args(["--json", "x.json", *options])


@pytest.mark.usefixtures("deepspeed_imported")
def test_rows(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    case = Case(ranks=1, zero_stage=1, megabytes=8, turns=1, folder=str(tmp_path), threads=1)
    rows = run_ranks(1, checkpoint.measure, case)[0]["rows"]
    assert tuple(row["way"] for row in rows) == WAYS
    for row in rows:
        assert 8 < row["state_mb"] < 20  # the towers beside the word table
        assert row["stall_s"] > 0 and row["total_s"] > 0 and row["first_stall_s"] > 0 and row["steps"] >= 2
    assert rows[1]["stall_s"] < min(rows[0]["stall_s"], rows[1]["total_s"])
    for way in WAYS[:2]:
        assert len(list((tmp_path / way).glob("step-*"))) == 1
    assert (tmp_path / "deepspeed" / "state").is_dir()
    assert "asynchronous" in checkpoint.table(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--turns", "0"), "--turns 0: must be above 0"),
        (("--ranks", "-1"), "--ranks -1"),
        (("--megabytes", "999999999"), "GB are needed"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        checkpoint.choose_case(parsed(*options), str(tmp_path))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    options = parsed("--folder", str(tmp_path / "absent"))
    options.json = tmp_path / "x.json"
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.run(options)
