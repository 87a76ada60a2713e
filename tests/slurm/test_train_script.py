"""What `launch/slurm/train.sbatch` asks of SLURM and hands to the ranks, with a stand-in for the training itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reid_dist.supervision.signals import ECHO_S
from tests.slurm.conftest import wait_until

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
# Trains for as long as its file says, or until a signal: then its ranks leave one after the other, as after a save.
TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
told, moments = [], []
def hear(number, frame):
    told.append(signal.Signals(number).name)
    moments.append(time.monotonic())
for name in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(name, hear)
own = {name: os.environ[name] for name in ("SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")}
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
plan = json.loads(Path("plan.json").read_text())
def record(**more):
    found = {"start": start, "arguments": sys.argv[1:], **own, **more}
    with Path("ranks.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\\n")
record(event="began")
deadline = time.monotonic() + (plan["seconds"] if start < plan["starts"] else 0)
while time.monotonic() < deadline and not told:
    time.sleep(0.02)
if told and plan["saves"]:
    named = [word.partition("=")[2] for word in sys.argv if word.startswith("output_dir=")]
    folder = Path(named[-1] if named else "runs/a") / "t2i" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text(f"step-{start}")
if told:
    time.sleep(0.1 + 0.4 * int(own["SLURM_PROCID"]))
code = 75 if told else plan["code"]
record(event="left", told=told, code=code, apart=moments[-1] - moments[0] if told else 0)
sys.exit(code)
"""
RECIPE = """\
output_dir: runs/a
model: {architecture: ViT-B-16}
stages: [{name: t2i, steps: 1, data: {root: shards, train: [cuhk_pedes], global_batch_size: 8}}]
"""


class Repository(NamedTuple):
    """A folder that the script takes for the repository."""

    slurm: Any
    folder: Path

    def submit(
        self, *words: str, seconds: float = 30, code: int = 0, starts: int = 1, saves: bool = True, options: tuple = ()
    ) -> str:
        """Job of two ranks on two nodes; it trains for so long in its first so many starts, then ends with `code`."""
        plan = {"seconds": seconds, "code": code, "starts": starts, "saves": saves}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        own = ("--nodes=2", "--ntasks-per-node=1", "--output=%A_%a.log", *options)
        return str(self.slurm.submit(*own, str(SCRIPT), *(words or ("recipe.yaml",)), cwd=self.folder))

    def events(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "ranks.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def wait_for_ranks(self, count: int) -> None:
        wait_until(lambda: len(self.events("began")) == count, f"{count} ranks to begin: {self.logs()}")

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def start_again(self, job: str) -> None:
        """Without the wait of some seconds in which a requeued job lies, though not within the second of its end.

        SLURM would take its new credential for the one that it has just revoked.
        """

        def requeued() -> bool:
            (fields,) = self.slurm.tasks(job).values()
            return fields["Restarts"] == "1" and fields["JobState"] != "COMPLETING"

        wait_until(requeued, f"job {job} to be requeued")
        time.sleep(1.5)
        (fields,) = self.slurm.tasks(job).values()
        if fields["JobState"] == "PENDING":
            self.slurm.run("scontrol", "update", f"jobid={job}", "starttime=now")


@pytest.fixture
def repository(slurm: Any, tmp_path: Path) -> Repository:
    folder = tmp_path / "with space"
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "train.py").write_text(TRAINING)
    (folder / "recipe.yaml").write_text(RECIPE)
    # Only its environment is missing: python is then the caller's.
    environment = slurm.environment | {"PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    return Repository(type(slurm)(environment), folder)


def _end(tasks: dict[str, dict[str, str]]) -> tuple[str, str, str]:
    (fields,) = tasks.values()
    return fields["JobState"], fields["ExitCode"], fields["Restarts"]


def test_told_to_stop_it_goes_back_into_the_queue_and_ends_by_itself(repository: Repository) -> None:
    job = repository.submit("recipe.yaml", "optimizer.lr=0.5", "--resume", "never")
    repository.wait_for_ranks(2)
    repository.slurm.run("scancel", "--signal=USR1", job)
    repository.start_again(job)
    assert _end(repository.slurm.wait(job)) == ("COMPLETED", "0:0", "1"), repository.logs()
    stopped, ended = repository.events("left")[:2], repository.events("left")[2:]
    assert [(each["start"], each["told"], each["code"]) for each in stopped] == [(0, ["SIGUSR1"], 75)] * 2
    assert [(each["start"], each["told"], each["code"]) for each in ended] == [(1, [], 0)] * 2
    # What the caller asked for holds for the first start only.
    assert stopped[0]["arguments"] == ["--resume", "auto", "recipe.yaml", "optimizer.lr=0.5", "--resume", "never"]
    assert ended[0]["arguments"] == ["recipe.yaml", "optimizer.lr=0.5", "--resume", "never", "--resume", "auto"]
    assert len({(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in (*stopped, *ended)}) == 1
    assert ended[0]["MASTER_ADDR"] == "127.0.1.1"


def test_a_job_that_gets_nowhere_does_not_come_back(repository: Repository) -> None:
    """Its time limit is too short: round and round it would go."""
    job = repository.submit(saves=False)
    repository.wait_for_ranks(2)
    repository.slurm.run("scancel", "--signal=USR1", job)
    assert _end(repository.slurm.wait(job)) == ("FAILED", "75:0", "0")
    assert "nothing was saved in all this time; give it a longer --time" in repository.logs()


def test_a_job_that_a_person_cancels_does_not_come_back(repository: Repository) -> None:
    job = repository.submit()
    repository.wait_for_ranks(2)
    repository.slurm.run("scancel", job)
    state, _, restarts = _end(repository.slurm.wait(job))
    assert (state, restarts) == ("CANCELLED", "0"), repository.logs()
    # They had the time to save, and were told once: a second signal would have ended them at once.
    assert [(each["told"], each["code"]) for each in repository.events("left")] == [(["SIGTERM"], 75)] * 2


def test_a_preempted_job_is_requeued_once(repository: Repository) -> None:
    job = repository.submit()
    repository.wait_for_ranks(2)
    urgent = repository.slurm.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:", cwd=repository.folder
    )
    assert _end(repository.slurm.wait(urgent))[:2] == ("COMPLETED", "0:0")
    repository.start_again(job)
    assert _end(repository.slurm.wait(job)) == ("COMPLETED", "0:0", "1"), repository.logs()
    for left in repository.events("left")[:2]:
        # SLURM tells them twice, the second time at once where the partition has no GraceTime: an echo, no second wish.
        assert set(left["told"]) == {"SIGTERM"} and left["code"] == 75 and left["apart"] < ECHO_S
    assert repository.events("began")[-1]["arguments"][-2:] == ["--resume", "auto"]


@pytest.mark.parametrize("code", [1, 2, 70, 73])
def test_any_other_exit_code_is_the_job_s_own(code: int, repository: Repository) -> None:
    job = repository.submit(seconds=0, code=code)
    assert _end(repository.slurm.wait(job)) == ("FAILED", f"{code}:0", "0"), repository.logs()


def test_an_array_is_one_run_for_each_seed_and_requeues_one_at_a_time(repository: Repository) -> None:
    options = ("--nodes=1", "--ntasks-per-node=2", "--array=3-4")
    job = repository.submit("recipe.yaml", "seed=9", "max_steps=5", seconds=8, options=options)
    repository.wait_for_ranks(4)
    # The last task has the number of the array: requeued by that, all tasks would begin again.
    repository.slurm.run("scancel", "--signal=USR1", f"{job}_4")
    repository.start_again(f"{job}_4")
    tasks = repository.slurm.wait(job)
    assert {task: _end({task: fields}) for task, fields in tasks.items()} == {
        "3": ("COMPLETED", "0:0", "0"),
        "4": ("COMPLETED", "0:0", "1"),
    }, repository.logs()
    for seed in (3, 4):
        own = [f"seed={seed}", f"output_dir=runs/a/seed{seed}"]
        of_seed = [each for each in repository.events("began") if own[0] in each["arguments"]]
        first, again = of_seed[0]["arguments"], of_seed[-1]["arguments"]
        assert first == ["--resume", "auto", "recipe.yaml", "seed=9", "max_steps=5", *own]
        assert len(of_seed) == 2 * (seed - 2)
        assert again == (first if seed == 3 else ["recipe.yaml", "seed=9", "max_steps=5", *own, "--resume", "auto"])
    # Tasks that share a node do not meet each other.
    assert len({each["MASTER_PORT"] for each in repository.events("began")}) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--resume", "auto"), "train.sbatch: name a recipe: sbatch"),
        (("absent.yaml",), "train.sbatch: absent.yaml: cannot read the recipe"),
        (("recipe.yaml", "optimizer.lrr=1"), "unknown key optimizer.lrr; did you mean lr?"),
    ],
)
def test_wrong_usage_is_one_line_before_any_rank_starts(
    words: tuple[str, ...], line: str, repository: Repository
) -> None:
    job = repository.submit(*words)
    assert _end(repository.slurm.wait(job)) == ("FAILED", "2:0", "0")
    assert line in repository.logs() and repository.logs().count("\n") == 1, repository.logs()
    assert not repository.events("began")


def test_it_is_submitted_from_the_repository(tmp_path: Path) -> None:
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(["bash", SCRIPT, "x.yaml"], env=environment, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert result.stderr.startswith("train.sbatch: submit it from the folder of the repository")


@pytest.mark.long
def test_chained_time_limits_finish_a_run_without_a_person(repository: Repository) -> None:
    """The least limit that SLURM knows is a minute; it tells the ranks up to a minute before they have to be gone."""
    began = time.monotonic()
    job = repository.submit(seconds=300, options=("--time=1", "--signal=USR1@5"))
    repository.wait_for_ranks(2)
    tasks = repository.slurm.wait(job, timeout_s=200)
    assert _end(tasks) == ("COMPLETED", "0:0", "1"), repository.logs()
    assert [each["told"] for each in repository.events("left")] == [["SIGUSR1"]] * 2 + [[]] * 2
    assert time.monotonic() - began < 120


@pytest.mark.long
def test_a_run_that_only_the_limit_itself_tells_is_requeued_too(repository: Repository) -> None:
    job = repository.submit(seconds=300, options=("--time=1", "--signal=CONT@1"))
    repository.wait_for_ranks(2)
    tasks = repository.slurm.wait(job, timeout_s=200)
    assert _end(tasks) == ("COMPLETED", "0:0", "1"), repository.logs()
    assert [set(each["told"]) for each in repository.events("left")] == [{"SIGTERM"}] * 2 + [set()] * 2
    assert all(each["apart"] < ECHO_S for each in repository.events("left"))
