"""A recipe over two hosts, by `deepspeed --hostfile` and by `torchrun`; and what is said when the cable breaks."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from reid_dist.config import RunConfig
from reid_dist.exit_codes import ExitCode
from reid_dist.files import write_text
from reid_dist.recipe import run
from reid_dist.recipe_file import dump_config
from tests.nodes.conftest import Host

pytestmark = pytest.mark.long

PORT = 29500
PYTHON = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


SETTINGS = ("stages.pretrain.steps=0", "stages.i2i.steps=0", "evaluation={}", "ledger=true")
# One thread a rank, as the ranks of tests have: sums in several threads round otherwise.
ALONE = {"LOCAL_WORLD_SIZE": str(os.cpu_count())}
HANG_S = 20


def _write(config: RunConfig, path: Path) -> str:
    write_text(path, dump_config(config))
    return str(path)


def _losses(run: Path) -> list[list[str]]:
    """Of each rank, to the last bit."""
    files = sorted((run / "t2i" / "ledger").glob("*.jsonl"))
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[loss for entry in of_rank if "step" in entry for loss in entry["losses"]] for of_rank in lines]


def _torchrun(node: int, *words: str) -> list[str]:
    where = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=node-a", f"--master-port={PORT}"]
    return ["torchrun", *where, *words]


def test_deepspeed_and_torchrun_train_the_same_over_two_hosts(
    hosts: list[Host], tiny_recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    first, second = hosts
    recipe = _write(tiny_recipe(tmp_path / "run", *SETTINGS, "max_steps=4"), tmp_path / "recipe.yaml")
    (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    train = ["launch/train.py", recipe]
    done = first.run("deepspeed", "--hostfile", str(tmp_path / "hostfile"), *train, timeout_s=200)
    assert done.returncode == 0, done.stdout + done.stderr
    other = [*train, f"output_dir={tmp_path / 'other'}"]
    with second.start(*_torchrun(1, *other), **PYTHON) as beside:
        done = first.run(*_torchrun(0, *other), timeout_s=200, **PYTHON)
        said = beside.communicate(timeout=60)
    assert (done.returncode, beside.returncode) == (0, 0), (done, said)
    assert _losses(tmp_path / "run") == _losses(tmp_path / "other")
    assert [len(of_rank) for of_rank in _losses(tmp_path / "run")] == [4, 4]
    assert first.processes() == second.processes() == []


class Ranks:
    """One rank on each host, without a launcher that would end one with the other."""

    def __init__(self, hosts: list[Host], recipe: str, port: int, running: ExitStack, other: str = "") -> None:
        shared = {
            **PYTHON,
            **ALONE,
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "node-a",
            "MASTER_PORT": str(port),
        }
        first, last = (["python", "-u", "launch/train.py", recipe, *more] for more in ([], [other] if other else []))
        self.processes = [
            host.start(*words, **shared, RANK=str(rank))
            for rank, (host, words) in enumerate(zip(hosts, (first, last), strict=True))
        ]
        for process in self.processes:
            running.callback(_end, process)

    def wait_for(self, text: str) -> None:
        """Until rank 0 prints a line with it."""
        out = self.processes[0].stdout
        assert out is not None
        for line in out:
            if text in line:
                return
        raise AssertionError(f"no {text!r}: {self.processes[0].communicate()}")

    def end(self, timeout_s: float) -> list[tuple[int, str]]:
        """Exit code and what it said on stderr, of each rank."""
        said = [process.communicate(timeout=timeout_s)[1] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, said, strict=True)]


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


@pytest.mark.fault("network cut")
def test_a_cut_cable_ends_both_sides_in_time_and_nothing_differs_afterwards(
    hosts: list[Host], tiny_recipe: Callable[..., RunConfig], tmp_path: Path, run_ranks: Callable
) -> None:
    settings = (*SETTINGS, "engine.backend=torch", "max_steps=40", "checkpoint.every=4", f"supervision.hang_s={HANG_S}")
    recipe = _write(tiny_recipe(tmp_path / "run", *settings), tmp_path / "recipe.yaml")
    with ExitStack() as running:
        ranks = Ranks(hosts, recipe, PORT + 1, running)
        ranks.wait_for("t2i 10/40")
        running.callback(hosts[1].mend)
        hosts[1].cut()
        began = time.monotonic()
        ended = ranks.end(HANG_S + 30)
        assert time.monotonic() - began < HANG_S + 5 + 2
    for rank, (code, said) in enumerate(ended):
        assert code == ExitCode.HUNG, said
        (line,) = re.findall(rf"^rank {rank}: no progress for .*$", said, re.MULTILINE)
        assert re.search(rf"in step \d+, phase .*rank {1 - rank}\b.*cut off", line), line
    with ExitStack() as running:
        again = Ranks(hosts, recipe, PORT + 2, running).end(400)
    assert [code for code, _ in again] == [0, 0], again
    run_ranks(2, run, tiny_recipe(tmp_path / "reference", *settings))
    runs = (tmp_path / "run", tmp_path / "reference")
    ended, expected = [(folder / "t2i" / "export" / "model.safetensors").read_bytes() for folder in runs]
    assert ended == expected


def test_other_settings_on_one_host_are_refused_before_training(
    hosts: list[Host], tiny_recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    recipe = _write(tiny_recipe(tmp_path / "run", *SETTINGS, "engine.backend=torch"), tmp_path / "recipe.yaml")
    with ExitStack() as running:
        ended = Ranks(hosts, recipe, PORT + 3, running, other="seed=7").end(120)
    for code, said in ended:
        assert code == ExitCode.WRONG_INPUT, said
        assert "train.py: setting seed: 7 on rank 1 (host node-b), but 0 on rank 0 (host node-a); start all" in said, (
            said
        )
    assert not (tmp_path / "run").exists()
