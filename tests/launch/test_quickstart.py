"""`launch/quickstart.sh`: its steps with pretended programs, and the smoke run of the whole way with its results."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image

from reid_dist.benchmarks.quickstart import report

ROOT = Path(__file__).parents[2]
RUN = ROOT / "runs" / "quickstart-fast"
METRICS = {"R1", "R5", "R10", "mAP", "mINP"}
SHARED_MEMORY = Path("/dev/shm")
RANKS = "take one of 1, 2, 4, 8, 16, 32, 64"

# Python notes its arguments and says how many GPUs there are; deepspeed does as its file `act` says.
PYTHON = """
case "$*" in
    *device_count*) echo "${GPUS:-0}" ;;
    *socket*) echo "$PORT" ;;
    *) echo "python $*" >>log ;;
esac
"""
DEEPSPEED = """
echo "deepspeed $*" >>log
[ ! -f act ] || . ./act
"""
# A launcher with two ranks, which may be deaf to TERM, and the file of DeepSpeed's collectives.
TRAIN_LONG = """
touch /dev/shm/deepspeed_allreduce_buffer_0_127.0.0.1_${PORT}_0
sleep 300 & echo $! >>ranks
bash -c '[ -z "$DEAF" ] || trap "" TERM; echo $$ >>ranks; touch started; while :; do sleep 0.2; done' &
wait
"""


class Tree:
    """A copy of the project's scripts with an environment of pretended programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch")
        # No real port has six digits: no running training can lose its files to this test.
        self.port = f"99999{os.getpid()}"
        self.put("launch/environment.sh", 'echo "set-up $*" >>log; [ ! -f set_up_fails ] || exit 2')
        self.put(".venv/bin/python", PYTHON)
        self.put(".venv/bin/deepspeed", DEEPSPEED)

    def put(self, name: str, body: str) -> None:
        """Writes a program."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Starts the quickstart."""
        clean = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        # A test run in the background may ignore the signals that the script is to hear.
        heard = ["env", "--default-signal=INT,TERM,HUP"]
        return subprocess.Popen(
            [*heard, "bash", "launch/quickstart.sh", *options], cwd=self.folder, text=True,
            env=clean | {"PORT": self.port} | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *options: str, **environment: str) -> tuple[int, str]:
        """Runs the quickstart; returns the exit code and what it says on stderr."""
        process = self.start(*options, **environment)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def log(self) -> list[str]:
        """The programs that ran, with their arguments."""
        file = self.folder / "log"
        return file.read_text().splitlines() if file.exists() else []

    def training(self) -> str:
        """The last command of deepspeed."""
        return [line for line in self.log() if line.startswith("deepspeed")][-1]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fats"], "unknown option --fats; it takes --fast"),
        (["--seed", "x"], "--seed needs a number of at most 15 digits, not 'x'"),
        (["--seed", "-1"], "--seed needs a number"),
        (["--seed", "9" * 16], "--seed needs a number"),
        (["--ranks"], "--ranks needs a number"),
        (["--ranks", "0"], f"--ranks 0: {RANKS}"),
        (["--ranks", "00"], f"--ranks 0: {RANKS}"),
        (["--ranks", "3"], f"--ranks 3: {RANKS}"),
        (["--ranks", "128"], f"--ranks 128: {RANKS}"),
        (["--ranks", "2", "--cpu", "x"], "unknown option x"),
    ],
)
def test_wrong_options_give_one_line_before_any_work(tree: Tree, options: list[str], words: str) -> None:
    code, said = tree.run(*options)
    assert code == 2
    assert words in said
    assert len(said.splitlines()) == 1
    assert tree.log() == []
    assert not (tree.folder / "runs").exists()


def test_the_global_batch_is_the_one_that_ranks_are_checked_against() -> None:
    for name in ("quickstart", "quickstart-fast"):
        recipe = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        assert recipe["data"]["global_batch_size"] == 64
        assert all("global_batch_size" not in stage.get("data", {}) for stage in recipe["stages"])


def test_help_is_the_head_of_the_script_from_any_folder(tree: Tree) -> None:
    command = ["bash", "quickstart.sh", "--help"]
    told = subprocess.run(command, cwd=tree.folder / "launch", capture_output=True, text=True)
    assert told.returncode == 0
    assert told.stdout.startswith("Fresh machine")
    assert "--compare" in told.stdout
    assert "set -" not in told.stdout


def test_steps_come_in_order(tree: Tree) -> None:
    assert tree.run("--fast", "--cpu", "--seed", "007") == (0, "")
    steps = [line.split(" --")[0] for line in tree.log()]
    assert steps[0] == "set-up"
    assert steps[1] == "python -m shards.world export cuhk_pedes"
    assert steps[-2] == "deepspeed"
    assert steps[-1] == "python -m reid_dist.benchmarks.quickstart runs/quickstart-fast"
    assert " seed=7 output_dir=runs/quickstart-fast" in tree.training()
    assert "data.root=data/quickstart-fast.seed7/shards" in tree.training()
    assert (tree.folder / "runs/quickstart-fast/settings").read_text() == "cpu-seed7-ranks2\n"


@pytest.mark.parametrize(
    ("gpus", "visible", "options", "accelerators"),
    [
        ("0", None, [], "--num_accelerators 2"),
        ("8", None, ["--cpu", "--ranks", "04"], "--num_accelerators 4"),
        ("1", None, [], "--num_accelerators 1"),
        ("6", None, [], "--num_accelerators 4"),
        ("6", None, ["--ranks", "2"], "--num_accelerators 2"),
        ("3", "5,1,7", [], "--include localhost:5,1"),
        ("3", "5,1,7", ["--ranks", "1"], "--include localhost:5"),
        ("3", "5,1,7", ["--cpu"], "--num_accelerators 2"),
        ("0", "-1", [], "--num_accelerators 2"),
    ],
)
def test_devices(tree: Tree, gpus: str, visible: str | None, options: list[str], accelerators: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert tree.run(*options, GPUS=gpus, **environment) == (0, "")
    assert tree.training().startswith(f"deepspeed {accelerators} --master_port")


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({"GPUS": "2"}, ["--ranks", "4"], "--ranks 4: there are 2 GPUs"),
        ({"GPUS": "1", "CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, [], "CUDA_VISIBLE_DEVICES=GPU-8932f937"),
    ],
)
def test_devices_that_cannot_be_used(tree: Tree, environment: dict[str, str], options: list[str], words: str) -> None:
    code, said = tree.run(*options, **environment)
    assert code == 2
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tree.folder / "runs").exists()


def test_another_seed_moves_the_earlier_run_aside_and_back(tree: Tree) -> None:
    runs = tree.folder / "runs"
    tree.run("--seed", "0")
    (runs / "quickstart" / "of").write_text("seed 0")
    tree.run("--seed", "1")
    assert (runs / "quickstart.cpu-seed0-ranks2" / "of").is_file()
    tree.run("--compare")
    assert (runs / "quickstart" / "of").read_text() == "seed 0"
    trained = [line for line in tree.log() if line.startswith("deepspeed")][-2:]
    assert "output_dir=runs/quickstart/without-pretrain stages.pretrain.steps=0" in trained[0]
    assert "output_dir=runs/quickstart/without-queue model.weights=runs/quickstart/i2i/export" in trained[1]
    assert trained[1].endswith("stages.t2i.loss.queue_size=0 stages.t2i.loss.in_batch_negatives=false")
    tree.run("--seed", "0", GPUS="2")
    assert sorted(folder.name for folder in runs.iterdir() if folder.is_dir()) == [
        "quickstart", "quickstart.cpu-seed0-ranks2", "quickstart.cpu-seed1-ranks2",
    ]  # fmt: skip
    assert (runs / "quickstart/settings").read_text() == "gpu-seed0-ranks2\n"


def test_nothing_is_moved_over_or_into_another_run(tree: Tree) -> None:
    tree.run()
    aside = tree.folder / "runs" / "quickstart.cpu-seed0-ranks2"
    aside.mkdir()
    code, said = tree.run("--seed", "1")
    assert code == 2
    assert said.count("\n") == 1
    assert "runs/quickstart.cpu-seed0-ranks2 exists" in said
    assert list(aside.iterdir()) == []
    assert (tree.folder / "runs/quickstart/settings").read_text() == "cpu-seed0-ranks2\n"


def test_a_folder_of_another_origin_is_left_alone(tree: Tree) -> None:
    (tree.folder / "runs" / "quickstart").mkdir(parents=True)
    code, said = tree.run()
    assert code == 2
    assert said.count("\n") == 1
    assert "no file settings" in said
    assert not any(line.startswith("deepspeed") for line in tree.log())


@pytest.mark.parametrize("code", [1, 2, 7])
def test_a_failed_step_is_named_and_keeps_its_exit_code(tree: Tree, code: int) -> None:
    (tree.folder / "act").write_text(f"exit {code}")
    returned, said = tree.run()
    assert returned == code
    assert said == (
        f"quickstart.sh: the training failed with exit code {code}, see above; run the same command again to continue\n"
    )
    (tree.folder / "act").unlink()
    assert tree.run() == (0, "")


def test_a_refused_set_up_speaks_for_itself(tree: Tree) -> None:
    (tree.folder / "set_up_fails").touch()
    assert tree.run() == (2, "")


def alive(pid: str) -> bool:
    """Whether a process runs (a zombie that nobody waits for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("number", "code", "deaf"),
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, "deaf"), (signal.SIGHUP, 129, "")],
)
def test_an_interruption_ends_every_rank(tree: Tree, number: signal.Signals, code: int, deaf: str) -> None:
    (tree.folder / "act").write_text(TRAIN_LONG)
    mine = SHARED_MEMORY / f"deepspeed_allreduce_buffer_0_127.0.0.1_{tree.port}_0"
    other = SHARED_MEMORY / f"deepspeed_allreduce_buffer_0_127.0.0.1_{tree.port}1_0"
    other.touch()
    try:
        process = tree.start(DEAF=deaf)
        until = time.monotonic() + 20
        while not ((tree.folder / "started").exists() and mine.exists()):
            assert time.monotonic() < until
            time.sleep(0.05)
        second, told = tree.run("--seed", "1")
        assert (second, told.count("\n")) == (2, 1)
        assert "another quickstart is running" in told
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == code
        assert said == "quickstart.sh: interrupted during the training; run the same command again to continue\n"
        assert not any(alive(pid) for pid in (tree.folder / "ranks").read_text().split())
        assert not mine.exists()
        assert other.exists()
    finally:
        other.unlink()
        mine.unlink(missing_ok=True)


def quickstart(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/quickstart.sh", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


class FastRun(NamedTuple):
    stdout: str
    processor_seconds: float  # of all its processes


@pytest.fixture(scope="module")
def fast_run() -> FastRun:
    before = processor_seconds()
    result = quickstart("--fast", "--cpu")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return FastRun(result.stdout, processor_seconds() - before)


def processor_seconds() -> float:
    """Of the processes that this one started and that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_results_have_every_row(fast_run: FastRun) -> None:
    results = json.loads((RUN / "results.json").read_text())
    assert {"commit", "seconds", "baselines", "stages"} <= set(results)
    assert {"install", "data", "train", "total"} <= set(results["seconds"])
    assert {"chance", "untrained", "histogram", "ridge", "oracle"} <= set(results["baselines"])
    assert [stage["name"] for stage in results["stages"]] == ["pretrain", "i2i", "t2i"]
    for stage in results["stages"]:
        assert set(stage["t2i"]) >= METRICS
        assert set(stage["i2i"]) >= METRICS
    assert 0 < results["baselines"]["chance"]["t2i"]["R1"] < results["baselines"]["oracle"]["t2i"]["R1"] <= 100


@pytest.mark.slow
def test_the_smoke_run_takes_at_most_90_seconds(fast_run: FastRun) -> None:
    """In processor time, of which two cores give 180 in 90 seconds: other tests run beside this one."""
    seconds = json.loads((RUN / "results.json").read_text())["seconds"]
    assert 0 < seconds["data"] + seconds["train"] + seconds["report"] <= seconds["total"]
    assert 20 < fast_run.processor_seconds <= 150


@pytest.mark.slow
def test_a_comparison_is_added_to_table_and_results(fast_run: FastRun) -> None:
    """What `--compare` trains; here the stage's own scores stand in its place."""
    beside = RUN / "without-queue"
    shutil.copytree(RUN / "t2i", beside / "t2i")
    first = (RUN / "results.json").read_text()
    try:
        table = report(RUN, ROOT / "data" / "quickstart-fast.seed0" / "oracle.json", {})
        results = json.loads((RUN / "results.json").read_text())
    finally:
        shutil.rmtree(beside)
        (RUN / "results.json").write_text(first)
    assert "after t2i, without a queue" in table
    last = results["stages"][-1]
    assert results["without_queue"] == [{key: last[key] for key in ("name", "t2i", "i2i")}]
    assert "without_pretrain" not in results


@pytest.mark.slow
def test_table_sheet_and_curves_are_there(fast_run: FastRun) -> None:
    assert "chance" in fast_run.stdout
    assert "t2i" in fast_run.stdout
    assert Image.open(RUN / "contact_sheet.png").width > 500
    assert list((RUN / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_running_it_again_reuses_what_is_there(fast_run: FastRun) -> None:
    before = {file: file.stat().st_mtime_ns for file in RUN.glob("*/export/model.safetensors")}
    began = time.monotonic()
    again = quickstart("--fast", "--cpu")
    assert again.returncode == 0
    assert time.monotonic() - began < 60
    assert {file: file.stat().st_mtime_ns for file in RUN.glob("*/export/model.safetensors")} == before


@pytest.mark.slow
def test_a_continued_run_counts_the_time_of_all_its_stages(fast_run: FastRun) -> None:
    """The second half of an interrupted run hands over the time of that half only."""
    first = (RUN / "results.json").read_text()
    staged = sum(json.loads(file.read_text())["seconds"] for file in RUN.glob("*/metrics.json"))
    try:
        (RUN / "results.json").unlink()
        report(RUN, ROOT / "data" / "quickstart-fast.seed0" / "oracle.json", {"install": 0, "data": 0, "train": 1})
        assert json.loads((RUN / "results.json").read_text())["seconds"]["train"] == round(staged) > 1
    finally:
        (RUN / "results.json").write_text(first)
