"""Arms as runs: what is complete is skipped, what is missing is made, a frozen tower keeps its scores."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import claims as launcher
from reid_dist.claims.arms import Arm
from reid_dist.claims.command import main
from reid_dist.claims.matrix import ARMS
from reid_dist.claims.running import Job, Settings, arm_scores, run_job
from reid_dist.claims.worlds import Sizes

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ROOT = Path(__file__).parents[2]
TINY = ("stages.train.steps=2", "data.global_batch_size=16", "log_every=1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "C1,X7"], ["--only X7", "no such claim", "C1, C2"]),
        (["--seeds", "0"], ["--seeds 0", "at least 1"]),
        (["--workers", "0"], ["--workers 0", "at least 1"]),
        (["--ids", "2"], ["--ids 2", "at least 4"]),
        (["--json", "claims.txt"], ["--json claims.txt", "ends in .json"]),
        (["--fast", "--only", "P1"], ["--fast --only P1", "leave out --fast"]),
        (["--recipe", "configs/nothing.yaml"], ["configs/nothing.yaml", "cannot read"]),
        (["--recipe", "configs/quickstart.yaml"], ["configs/quickstart.yaml", "last stage must be named train"]),
        (["optimizer.lrr=1"], ["unknown key optimizer.lrr", "did you mean lr?"]),
        (["stages.train.steps=0"], ["must be named train and have steps"]),
    ],
)
def test_wrong_input_gives_one_clear_line_before_anything_is_made(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs", str(tmp_path / "runs"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
    assert not (tmp_path / "runs").exists()


def test_the_launcher_only_starts() -> None:
    assert launcher.main is main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    recipe = ROOT / "configs" / "claims.yaml"
    overrides = (*TINY, f"model.architecture={ROOT / 'configs' / 'models' / 'row_conv_small.json'}")
    sizes = Sizes(captioned=16, images=16, test=6, pairs=60)
    return Settings(recipe, overrides, tmp_path_factory.mktemp("runs"), "claims", sizes)


@pytest.fixture(scope="module")
def done(tiny: Settings, run_ranks) -> Callable[..., list[int]]:
    """`done(*names)`: runs arms in a process of their own, as the command does; returns what progress was told."""

    def run(*names: str) -> list[int]:
        return run_ranks(1, run_arms, tiny, names)[0]

    return run


def run_arms(settings: Settings, names: tuple[str, ...]) -> list[int]:
    told: list[int] = []
    run_job(Job(settings, 0, tuple(ARMS[name] for name in names)), told.append)
    return told


def exports(settings: Settings) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in settings.folder.rglob("model.safetensors")}


def test_a_chain_runs_and_a_second_time_trains_nothing(tiny: Settings, done: Callable[..., list[int]]) -> None:
    assert done("base", "i2i", "i2i-text") == [16, 2, 2]
    before = exports(tiny)
    assert len(before) == 6  # two stages each, the first of them of no steps
    assert done("base", "i2i", "i2i-text") == [16, 2, 2]
    assert exports(tiny) == before
    log = (tiny.seed_folder(0) / "logs" / "i2i-text.log").read_text()
    assert "train: complete in" in log and "loss" in log


def test_a_frozen_tower_answers_image_queries_exactly_as_before(tiny: Settings, done: Callable[..., list[int]]) -> None:
    done("base", "i2i", "i2i-text")
    before, after = (arm_scores(tiny, ARMS[name], 0) for name in ("i2i", "i2i-text"))
    assert before["i2i"] == after["i2i"]
    assert before["t2i"] != after["t2i"]


def test_an_arm_begins_with_the_weights_of_the_arm_before(tiny: Settings, done: Callable[..., list[int]]) -> None:
    done("base", "i2i", "i2i-text")
    config = (tiny.run_folder("i2i-text", 0) / "config.yaml").read_text()
    assert f"weights: {tiny.export('i2i', 0)}" in config
    log = (tiny.seed_folder(0) / "logs" / "i2i-text.log").read_text()
    assert f"weights {tiny.export('i2i', 0)}: " in log


def test_costs_are_kept_from_the_run_that_trained(tiny: Settings, done: Callable[..., list[int]]) -> None:
    done("base")
    path = tiny.run_folder("base", 0) / "cost.json"
    first = path.read_text()
    assert json.loads(first)["cpu_seconds"] > 0
    done("base")
    assert path.read_text() == first
    path.unlink()
    done("base")
    assert not path.exists(), "what remained to be done is not what the arm costs"
    path.write_text(first)


def test_what_goes_wrong_names_seed_and_arm(tiny: Settings, done: Callable[..., list[int]]) -> None:
    done("base")
    wrong = Arm("wrong", "", {"kind": "t2i", "data": {"train": ["nothing"]}})
    with pytest.raises(Exception, match=r"seed 0, arm wrong: .*nothing.*no such shard folder"):
        run_job(Job(tiny, 0, (wrong,)), lambda _: None)


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        (OSError(28, "No space left on device"), OSError, r"seed 0, arm i2i: .*No space left"),
        (ZeroDivisionError("oh"), RuntimeError, r"seed 0, arm i2i failed, see .*logs/i2i.log: oh"),
    ],
)
def test_faults_of_an_arm_name_it(
    tiny: Settings, done: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, fault, kind, told: str
) -> None:
    def fail(config: object) -> None:
        raise fault

    done("base")
    monkeypatch.setattr("reid_dist.claims.running.run", fail)
    with pytest.raises(kind, match=told):
        run_job(Job(tiny, 0, (ARMS["i2i"],)), lambda _: None)


def test_changed_settings_are_refused_not_mixed(tiny: Settings, done: Callable[..., list[int]]) -> None:
    done("base")
    other = Settings(tiny.recipe, (*tiny.overrides, "optimizer.lr=5e-4"), tiny.folder, tiny.level, tiny.sizes)
    with pytest.raises(Exception, match=r"seed 0, arm base: .*made from other settings"):
        run_job(Job(other, 0, (ARMS["base"],)), lambda _: None)


@pytest.mark.long
def test_the_command_runs_every_kind_of_arm_on_two_workers_and_continues(tmp_path: Path, run_ranks) -> None:
    """Joint stages, second class tokens, prompts, words and re-ranking; and one seed on two workers, so that this
    process runs the first phase itself and leaves its port and rank in the environment of the others. The second
    time, on one worker, everything is there."""
    arguments = ["--only", "P2,D2,D4,H2", "--seeds", "1", "--ids", "8", "--runs", str(tmp_path / "runs"), *TINY]
    arguments.append(f"model.architecture={ROOT / 'configs' / 'models' / 'row_conv_tiny.json'}")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    command = [sys.executable, "launch/claims.py", *arguments, "--workers", "2", "--json", str(one)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| P2 |") == 1
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    assert made
    assert run_ranks(1, main, [*arguments, "--workers", "1", "--json", str(two)]) == [0]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    first, second = json.loads(one.read_text()), json.loads(two.read_text())
    first["machine"] = second["machine"] = None
    assert first == second
    assert {claim["name"] for claim in first["claims"]} == {"P2", "D2", "D4", "H2"}
    assert all(claim["verdict"] == "within noise" for claim in first["claims"])
    assert "gradient_cosine" in first["arms"]["joint-double"]
    assert one.with_suffix(".md").read_text().count("\n## ") == 4 + 3  # arms, gradients, floors
