"""A score is read again for the very same model, data and rules, and for nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import ROLES
from reid_dist.evaluate.benchmarks import Benchmark
from reid_dist.evaluate.candidates import open_candidates
from reid_dist.evaluate.records import Records
from reid_dist.evaluation.reranking.choice import KReciprocal, NeighbourJaccard

METRICS = dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP", "tied"), 12.5) | {"queries": 7.0, "skipped": 1.0}


def records(run: Path, sets: Path, split: str = "test") -> Records:
    return Records(open_candidates([run])[0], Benchmark("short", ShardSet(sets), split, ("t2i",)))


def test_what_was_written_is_read_and_marked(new_run: Callable[..., Path], world: Path) -> None:
    run, sets = new_run("run"), world / "cuhk_pedes"
    written = records(run, sets)
    row = written.row("t2i", KReciprocal(), METRICS, 20, 0.5)
    written.write(row)
    (file,) = (run / "t2i" / "evaluation").iterdir()
    assert file.name.startswith("cuhk_pedes.test.t2i.k_reciprocal.") and file.suffix == ".json"
    assert records(run, sets).read("t2i", KReciprocal()) == replace(row, is_read=True) and not row.is_read
    known = json.loads(file.read_text())
    assert known["reranking"] == {"name": "k_reciprocal", "k1": 20, "k2": 6, "weight": 0.3}
    assert known["metrics"]["mAP"] == 12.5


def test_another_question_model_or_set_is_not_answered(
    new_run: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    run, sets = new_run("run"), world / "cuhk_pedes"
    written = records(run, sets)
    written.write(written.row("t2i", NeighbourJaccard(), METRICS, 20, 0.5))
    for question in (("i2t", NeighbourJaccard()), ("t2i", NeighbourJaccard(weight=0.1)), ("t2i", None)):
        assert records(run, sets).read(*question) is None
    assert records(run, sets, "val").read("t2i", NeighbourJaccard()) is None
    assert records(run, world / "market1501").read("t2i", NeighbourJaccard()) is None
    changed = tmp_path / "cuhk_pedes"  # one more distractor under the same name
    shutil.copytree(sets, changed)
    index = np.load(changed / "index.npy")
    index["role"][-1] = ROLES.index("distractor")
    np.save(changed / "index.npy", index)
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest | {"index_sha256": ""}))
    assert records(run, changed).read("t2i", NeighbourJaccard()) is None
    assert records(run, sets).read("t2i", NeighbourJaccard()) is not None
    other = new_run("other", "seed=1")
    (other / "t2i" / "evaluation").symlink_to(run / "t2i" / "evaluation")
    assert records(other, sets).read("t2i", NeighbourJaccard()) is None


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"decides": 3}', "whole but not finite"])
def test_a_damaged_record_is_none(new_run: Callable[..., Path], world: Path, damage: str) -> None:
    run, sets = new_run("run"), world / "cuhk_pedes"
    written = records(run, sets)
    written.write(written.row("t2i", None, METRICS, 20, 0.5))
    (file,) = (run / "t2i" / "evaluation").iterdir()
    text = file.read_text()
    file.write_text(text.replace("12.5", "NaN") if damage.startswith("whole") else damage)
    assert records(run, sets).read("t2i", None) is None
    file.write_text(text)
    assert records(run, sets).read("t2i", None) is not None


def test_a_folder_that_one_may_not_write_to_is_a_note(run: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = records(run, world / "cuhk_pedes")
    row = kept.row("t2i", None, METRICS, 20, 0.5)

    def refuse(code: int) -> Callable[..., None]:
        def write(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        return write

    monkeypatch.setattr("reid_dist.evaluate.records.write_json", refuse(13))
    kept.write(row)
    assert "scores cannot be recorded there (Permission denied)" in kept.problem
    monkeypatch.setattr("reid_dist.evaluate.records.write_json", refuse(28))
    with pytest.raises(OSError, match="No space left"):
        kept.write(row)
