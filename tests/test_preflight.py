import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist import preflight
from reid_dist.config import RunConfig
from reid_dist.distributed import rank
from reid_dist.errors import UserError
from reid_dist.inputs import Inputs, open_inputs
from reid_dist.preflight import Told, check_alike, differences, gather_facts, late_clocks

ALIKE = {"python": "3.11.2", "torch": "2.15.0", "setting seed": "0"}


def _told(*changes: dict[str, str]) -> list[Told]:
    """Ranks, two on a host, that differ from ALIKE by the given facts."""
    return [Told(f"host{number // 2}", ALIKE | change, 0.0) for number, change in enumerate(changes)]


def test_the_odd_ranks_are_named_with_their_host_and_both_values() -> None:
    old = {"torch": "2.14.1"}
    (line,) = differences(_told({}, {}, old, old, {}, {}))
    assert line == (
        "torch: 2.14.1 on ranks 2, 3 (host host1), but 2.15.0 on rank 0 (host host0); install the same version on all"
        " hosts"
    )


def test_each_difference_has_a_line_and_equal_ranks_none() -> None:
    assert list(differences(_told({}, {}))) == []
    lines = list(differences(_told({}, {"torch": "not installed", "setting seed": "1"}, {}, {"python": "3.10.1"})))
    assert [line.partition(":")[0] for line in lines] == ["python", "torch", "setting seed"]
    assert "rank 3 (host host1)" in lines[0] and "rank 1 (host host0)" in lines[1]


def test_ranks_that_do_not_know_a_fact_are_not_compared() -> None:
    assert list(differences(_told({"commit": "a"}, {}, {"commit": "a"}, {}))) == []
    (line,) = differences(_told({"commit": "a"}, {}, {"commit": "b"}, {}))
    assert line.startswith("commit: b on rank 2 (host host1), but a on rank 0")


def test_a_clock_far_off_is_a_warning() -> None:
    ranks = [Told("a", {}, 1000.0), Told("b", {}, 1029.0), Told("c", {}, 4600.0), Told("d", {}, 900.0)]
    ahead, behind = late_clocks(ranks)
    assert "the clock of c is 3600 s ahead of that of a" in ahead
    assert "the clock of d is 100 s behind that of a" in behind


def _check(config: RunConfig, inputs: Inputs, other: RunConfig, changed: str, skew_s: float) -> str:
    """What the check says to this rank; rank 1 has other settings, a changed shard set, or another clock."""
    if rank() == 1:
        config = other
        preflight.time = type("Skewed", (), {"time": staticmethod(lambda: time.time() + skew_s)})  # type: ignore
        for location, shards in inputs.shards.items():
            if changed and location.endswith(changed):
                shards.manifest = shards.manifest.model_copy(update={"dataset": "other"})
    try:
        check_alike(config, inputs)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def config(tiny_recipe: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_recipe(tmp_path_factory.mktemp("run"), "stages.pretrain.steps=0")


@pytest.fixture(scope="module")
def inputs(config: RunConfig) -> Inputs:
    return open_inputs(config, 2)


def test_ranks_that_are_alike_pass(config: RunConfig, inputs: Inputs, run_ranks: Callable) -> None:
    assert run_ranks(2, _check, config, inputs, config, "", 5.0) == ["", ""]


def test_other_settings_are_named_on_every_rank(
    config: RunConfig, inputs: Inputs, tiny_recipe: Callable[..., RunConfig], run_ranks: Callable
) -> None:
    other = tiny_recipe(config.output_dir, "stages.pretrain.steps=0", "stages.t2i.optimizer.lr=0.5")
    said, again = run_ranks(2, _check, config, inputs, other, "", 0.0)
    assert said == again
    assert said.startswith("setting stages.t2i.optimizer.lr: 0.5 on rank 1 (host ")
    assert "but 0.001 on rank 0" in said and "\n" not in said


def test_another_shard_set_is_named(config: RunConfig, inputs: Inputs, run_ranks: Callable) -> None:
    said, again = run_ranks(2, _check, config, inputs, config, "cuhk_pedes", 0.0)
    assert said == again
    assert said.startswith("manifest of ") and "cuhk_pedes: " in said and "on rank 1" in said
    assert "give all hosts the same files" in said and "\n" not in said


def test_a_clock_is_no_reason_to_refuse(
    config: RunConfig, inputs: Inputs, run_ranks: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, _check, config, inputs, config, "", -7200.0) == ["", ""]
    # Two ranks of one host: named all the same.
    assert "7200 s behind" in capfd.readouterr().out


def test_streams_and_the_program_itself_are_among_the_facts(
    tiny_recipe: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_recipe(tmp_path)
    inputs = open_inputs(config, 1)
    facts = gather_facts(config, inputs)
    assert {"python", "torch", "word list", "streamed sets of pretrain", "source files of reid_dist"} <= facts.keys()
    assert facts["setting stages.t2i.loss.queue_size"] == "4096"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert facts.keys() - gather_facts(config, inputs).keys() <= {"source files of reid_dist", "commit"}


def test_a_rank_of_another_program_is_not_told_a_hundred_lines(
    config: RunConfig, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preflight.distributed, "all_gather_object", lambda told: [told, Told("b", dict.fromkeys(told.facts, "x"), 0.0)]
    )
    with pytest.raises(UserError) as refusal:
        check_alike(config, inputs)
    lines = str(refusal.value).splitlines()
    assert len(lines) == preflight.MOST_LINES + 1 and "more differences" in lines[-1]
