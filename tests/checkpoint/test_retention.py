"""Which checkpoints stay."""

from pathlib import Path

import pytest

from reid_dist.checkpoint import retention
from reid_dist.checkpoint.manifest import MANIFEST_FILE
from reid_dist.checkpoint.retention import purge, saved_steps
from tests.checkpoint import states


def kept(folder: Path) -> list[int]:
    return list(saved_steps(folder))


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 4.0, float("nan"), 2.0]
    for best, expected in ((False, [4, 5]), (True, [2, 4, 5])):
        folder = tmp_path / str(best)
        checkpoints = states.writer(folder, keep=2, best=best)
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(step, states.pieces(step), states.private(step), states.record(step, loss))
        checkpoints.finish()
        assert kept(folder) == expected
        assert (folder / "latest").read_text().strip() == "step-00000005"


def test_steps_that_a_run_left_behind_when_it_fell_back_go(tmp_path: Path) -> None:
    states.save(tmp_path, 10, 20, 30)
    states.save(tmp_path, 15, keep=2)
    assert kept(tmp_path) == [10, 15]
    assert (tmp_path / "latest").read_text().strip() == "step-00000015"


def test_order_is_that_of_numbers(tmp_path: Path) -> None:
    states.save(tmp_path, 99_999_999, 100_000_000)
    assert kept(tmp_path) == [99_999_999, 100_000_000]


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states.save(tmp_path, 1, 2)
    monkeypatch.setattr(retention.shutil, "rmtree", lambda path, ignore_errors: None)  # killed before
    purge(tmp_path, 2, 1, False)
    assert kept(tmp_path) == [2]
    assert not (tmp_path / "step-00000001" / MANIFEST_FILE).exists()
    monkeypatch.undo()
    purge(tmp_path, 2, 1, False)
    assert not (tmp_path / "step-00000001").exists()


def test_a_damaged_manifest_is_not_the_best(tmp_path: Path) -> None:
    states.save(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000001" / MANIFEST_FILE).write_text('{"loss": "low"}')
    (tmp_path / "step-00000002" / MANIFEST_FILE).write_text("[")
    purge(tmp_path, 3, 1, True)
    assert kept(tmp_path) == [3]
