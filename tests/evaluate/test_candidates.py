"""Models are found, named, verified, and known as seeds of one another; what they were trained on is told."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.evaluate.candidates import open_candidates
from reid_dist.evaluate.training_data import training_data

NewRun = Callable[..., Path]


def test_names_say_run_and_stage(run: Path, tmp_path: Path) -> None:
    (candidate,) = open_candidates([run])
    assert candidate.name == "run/t2i" and candidate.export == run / "t2i" / "export" and candidate.seed == 0
    stages = open_candidates([run / "i2i", run / "t2i" / "export"])
    assert [each.name for each in stages] == ["run/i2i", "run/t2i"] and stages[0].family != stages[1].family
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert [each.name for each in open_candidates([run, copy])] == [str(x / "t2i" / "export") for x in (run, copy)]
    shutil.copytree(run / "t2i" / "export", tmp_path / "alone")
    (alone,) = open_candidates([tmp_path / "alone"])
    assert alone.name == "alone" and alone.family is None and alone.digest == candidate.digest


def test_wrong_runs(run: Path, tmp_path: Path, new_run: NewRun) -> None:
    with pytest.raises(UserError, match=r"run/typo: no such folder; name the folder of a run"):
        open_candidates([run / "typo"])
    with pytest.raises(UserError, match="no exported model"):
        open_candidates([tmp_path])
    with pytest.raises(UserError, match="is named twice"):
        open_candidates([run, run / "t2i"])
    damaged = new_run("damaged")
    weights = damaged / "t2i" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="does not match its hash"):
        open_candidates([damaged])


def test_a_family_differs_in_the_seed_alone(run: Path, new_run: NewRun) -> None:
    runs = [run, new_run("seed1", "seed=1"), new_run("rate", "seed=2", "optimizer.lr=0.5")]
    first, seed, rate = open_candidates(runs)
    assert first.family == seed.family != rate.family and (first.seed, seed.seed) == (0, 1)
    assert first.digest != seed.digest


def test_training_data_are_those_of_the_stage_and_all_before_it(run: Path, world: Path) -> None:
    of_i2i, of_t2i = (training_data(run / stage / "export") for stage in ("i2i", "t2i"))
    assert of_i2i.names == ["generic", "market1501"] and of_t2i.names == ["generic", "market1501", "cuhk_pedes"]
    assert len(of_i2i.unknown) == 1 and "training set generic (" in of_i2i.unknown[0]  # the tiny world has none
    pedes, market = ShardSet(world / "cuhk_pedes"), ShardSet(world / "market1501")
    assert of_i2i.holds(market) and not of_i2i.holds(pedes) and of_t2i.holds(pedes)
    assert of_t2i.overlap([pedes, market]) == []  # a set's own splits are for its authors to keep apart


def test_the_weights_that_a_run_began_with_count(run: Path, new_run: NewRun) -> None:
    steps = "stages.pretrain.steps=0", "stages.t2i.steps=0"
    later = new_run("later", *steps, f"model.weights={run / 'i2i' / 'export'}")
    assert training_data(later / "t2i" / "export").names == ["market1501", "generic"]
    foreign = new_run("foreign", *steps, "model.weights=open_clip:openai")
    assert training_data(foreign / "t2i" / "export").unknown == [
        "what the first weights open_clip:openai were trained on"
    ]


def test_training_sets_that_were_moved_are_looked_for_below_the_root(
    new_run: NewRun, world: Path, tmp_path: Path
) -> None:
    gone = new_run("gone", f"data.root={tmp_path / 'nowhere'}") / "t2i" / "export"
    there, nowhere = training_data(gone, str(world)), training_data(gone)
    assert [shards.name for shards, _ in there.sets] == ["market1501", "cuhk_pedes"] and len(there.unknown) == 1
    assert nowhere.sets == [] and len(nowhere.unknown) == 3 and nowhere.names == there.names


def test_settings_that_cannot_be_read_leave_the_model_and_say_so(new_run: NewRun, tmp_path: Path) -> None:
    older = new_run("older")
    (older / "config.yaml").write_text((older / "config.yaml").read_text() + "gone: 1\n")
    (candidate,) = open_candidates([older])
    assert candidate.training.names == [] and "unknown key gone" in candidate.training.unknown[0]
    assert candidate.family is None
    (older / "config.yaml").unlink()
    (candidate,) = open_candidates([older / "t2i"])
    assert "no config.yaml of its run lies above it" in candidate.training.unknown[0]
