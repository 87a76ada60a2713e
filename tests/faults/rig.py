"""Runs of the recipe in `recipe.yaml` that meet faults, as real processes, and what is asked of them afterwards.

Two ways to start the same `victim.main`: `fork` makes ranks of this process, which has imported everything; `launch`
starts a launcher, as a person does. A forked rank is a process like any other: what kills it is SIGKILL.
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import train  # noqa: F401 (here, so that ranks are forked with it)
from reid_dist.distributed import free_port
from reid_dist.files import content_sha256
from reid_dist.ledger import read_ledger
from reid_dist.supervision.leaving import supervised
from reid_dist.supervision.parents import die_with_parent

ROOT = Path(__file__).parents[2]
STEPS = {"pretrain": 5, "i2i": 12}
_OWN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "FAULTS",
    "RECORD",
    "REID_DIST_SUPERVISION",
    "PATIENCE",
)
Fault = dict[str, Any]
_started: list["Forked | Launched"] = []


@dataclass(repr=False)
class Ended:
    """How a run ended.

    Attributes:
        codes: exit codes in rank order, negative for a signal; of a launcher its own alone.
        seconds: from the first rank's end to the last's; of a launcher the whole time.
        out: of all ranks.
        err: of all ranks.
        left: processes that were still there, and were ended.
        port: where the ranks met; 0: unknown.
    """

    codes: list[int]
    seconds: float
    out: str
    err: str
    left: list[int]
    port: int = 0

    @property
    def said(self) -> list[str]:
        """The lines that say why."""
        starts = ("train.py: ", "rank 0: ", "rank 1: ", "rank 2: ", "supervise.py: ")
        return [line for line in self.err.splitlines() if line.startswith(starts)]

    def __repr__(self) -> str:
        return f"codes {self.codes}\n{self.out[-3000:]}\n{self.err[-5000:]}"


@dataclass
class Run:
    """A folder that a run trains into, started again and again."""

    folder: Path
    world: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def record(self) -> Path:
        return self.folder / "record"

    def arguments(self, *more: str) -> list[str]:
        where = (
            f"output_dir={self.output}",
            f"data.root={self.world}",
            f"model.vocabulary={self.world}/vocabulary.txt",
        )
        return [str(ROOT / "tests/faults/recipe.yaml"), *where, *self.overrides, *more]

    def environment(self, faults: Sequence[Fault]) -> dict[str, str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return {"FAULTS": json.dumps(list(faults)), "RECORD": str(self.record)}

    def fork(self, *more: str, faults: Sequence[Fault] = (), ranks: int = 2, timeout_s: float = 120) -> Ended:
        """Runs it on forked ranks, to the end of the last."""
        return self.start(*more, faults=faults, ranks=ranks).wait(timeout_s)

    def start(self, *more: str, faults: Sequence[Fault] = (), ranks: int = 2) -> "Forked":
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= self.environment(faults) | {"PATIENCE": "0.3"}
        number = len(list(self.folder.glob("said*-0.out")))
        said = [self.folder / f"said{number}-{rank}" for rank in range(ranks)]
        pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _be_rank(self.arguments(*more), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, said[rank])
            pids.append(pid)
        _started.append(forked := Forked(pids, said, int(shared["MASTER_PORT"])))
        return forked

    def launch(
        self,
        *more: str,
        faults: Sequence[Fault] = (),
        ranks: int = 2,
        supervise: list[str] | None = None,
    ) -> "Launched":
        """Starts it with the deepspeed launcher, under `launch/supervise.py` where options for it are given."""
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port := free_port())]
        command += [str(ROOT / "tests/faults/victim.py"), *self.arguments(*more)]
        if supervise is not None:
            command = [sys.executable, str(ROOT / "launch/supervise.py"), *supervise, "--", *command]
        clean = {name: value for name, value in os.environ.items() if name not in _OWN}
        marker = f"FAULTS_RUN={uuid.uuid4().hex}"
        environment = clean | self.environment(faults) | dict([marker.split("=")])
        number = len(list(self.folder.glob("launched*.out")))
        said = self.folder / f"launched{number}"
        with open(f"{said}.out", "w") as out, open(f"{said}.err", "w") as err:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
            )
        _started.append(launched := Launched(process, marker, said, port))
        return launched


def _be_rank(arguments: list[str], environment: dict[str, str], said: Path) -> None:
    """In a forked process: both streams into files, C's too; ends without what only the parent may do at its end."""
    os.setsid()
    die_with_parent()  # above all: what it forks ends with it
    os.chdir(ROOT)
    for name in _OWN:
        os.environ.pop(name, None)
    os.environ.update(environment)
    code = 1
    with open(f"{said}.out", "w") as out, open(f"{said}.err", "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        faulthandler.enable(err)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                from tests.faults import victim

                code = supervised(lambda: victim.main(arguments))
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:
                traceback.print_exc()
    os._exit(code)


@dataclass
class Forked:
    """Ranks that were forked."""

    pids: list[int]
    said: list[Path]
    port: int

    def processes(self) -> list[int]:
        """Everything that runs in the ranks' sessions."""
        return _in_sessions(self.pids)

    def wait(self, timeout_s: float = 120) -> Ended:
        """Waits for the last; what is left then, or below a rank that has ended, is ended and told of."""
        deadline, codes, first = time.monotonic() + timeout_s, dict[int, int](), 0.0
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for pid in self.pids:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
                    first = first or time.monotonic()
            time.sleep(0.02)
        seconds = time.monotonic() - first if first else timeout_s
        left = _end([pid for pid in self.pids if pid not in codes])
        for pid in set(self.pids) - codes.keys():
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left += _end_soon(lambda: _in_sessions(self.pids))
        out, err = ("".join(Path(f"{said}.{kind}").read_text() for said in self.said) for kind in ("out", "err"))
        return Ended([codes[pid] for pid in self.pids], seconds, out, err, left, self.port)


@dataclass
class Launched:
    """A launcher and what it has started."""

    process: "subprocess.Popen[bytes]"
    marker: str
    said: Path
    port: int

    def wait(self, timeout_s: float = 180) -> Ended:
        """Waits for the launcher; what is left ten seconds later is ended and told of."""
        began = time.monotonic()
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = 999
        left = _end_soon(self.processes, 10.0)
        self.process.wait()
        out, err = (Path(f"{self.said}.{kind}").read_text() for kind in ("out", "err"))
        return Ended([code], time.monotonic() - began, out, err, left, self.port)

    def processes(self) -> list[int]:
        """Everything that runs with this start's mark in its environment."""
        mark, found = self.marker.encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if mark in entry.joinpath("environ").read_bytes():
                        found.append(int(entry.name))
        return found


def _in_sessions(sessions: list[int]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, session = entry.joinpath("stat").read_text().rpartition(") ")[2].split()[:4]
                if int(session) in sessions and state not in "ZX":
                    found.append(int(entry.name))
    return found


def _end_soon(find: Callable[[], list[int]], patience_s: float = 2.0) -> list[int]:
    """What is still found after some seconds, which is ended."""
    deadline = time.monotonic() + patience_s
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return _end(found)


def _end(pids: list[int]) -> list[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(pids)


def end_started() -> None:
    """Ends what a test that failed has left running."""
    for each in _started:
        _end(each.processes())
        for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{each.port}_*"):
            file.unlink(missing_ok=True)
    _started.clear()


# --- the oracles


def differences(run: Run, reference: Run, exact: bool = True) -> dict[str, list[str]]:
    """What differs from the run that nothing happened to: O1 losses, O2 digests of saves, O3 samples and exports."""
    found: dict[str, list[str]] = {"O1": [], "O2": [], "O3": []}
    for stage, steps in STEPS.items():
        ledgers = sorted((run.output / stage / "ledger").glob("rank-*.jsonl"))
        if len(ledgers) != len(list((reference.output / stage / "ledger").glob("rank-*.jsonl"))):
            found["O3"].append(f"{stage}: {len(ledgers)} ledgers")
        for path in ledgers:
            lines = list(read_ledger(path))
            expected = list(read_ledger(reference.output / stage / "ledger" / path.name))
            if [line["step"] for line in lines] != list(range(steps)):
                found["O3"].append(f"{stage} {path.stem}: steps {[line['step'] for line in lines]}")
            for line, right in zip(lines, expected, strict=False):
                where = f"{stage} {path.stem} step {line['step']}"
                if line["losses"] != right["losses"]:
                    found["O1"].append(f"{where}: {line['losses']}, not {right['losses']}")
                if any(line[key] != right[key] for key in ("samples", "crc32", "updated")):
                    found["O3"].append(f"{where}: other samples")
        for name in ("model.safetensors", "handover.safetensors"):
            paths = [each.output / stage / "export" / name for each in (run, reference)]
            if paths[0].is_file() != paths[1].is_file():
                found["O3"].append(f"{stage}: {name} is there in one run only")
            elif paths[0].is_file() and content_sha256(paths[0]) != content_sha256(paths[1]):
                found["O3"].append(f"{stage}: {name} is another")
    expected_saves = saves(reference)
    for key, part in saves(run).items():
        if key in expected_saves:
            found["O2"] += [f"{key}: {name}" for name in part if part[name] != expected_saves[key].get(name)]
        else:
            found["O2"].append(f"{key}: not a save of the reference")
    return found


def saves(run: Run) -> dict[tuple[str, str, int], dict[str, str]]:
    """What each save was made of, by file, stage and step; of saves that were made again the last."""
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for path in sorted(run.record.glob("*.jsonl")):
        before: dict[tuple[str, str, int], dict[str, str]] = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            kind = "parts" if "weights" in line["parts"] else path.stem
            before[kind, line["stage"], line["step"]] = line["parts"]
        found |= before
    return found


def assert_same(run: Run, reference: Run) -> None:
    """O1, O2 and O3."""
    found = differences(run, reference)
    assert not any(found.values()), json.dumps({name: each[:6] for name, each in found.items()}, indent=1)


def assert_clean(run: Run, *ended: Ended) -> None:
    """O4's end: no process, no temporary file, nothing in shared memory."""
    for each in ended:
        assert not each.left, f"left behind: {each.left}\n{each}"
        assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{each.port}_*"))
    names = [path for path in run.output.rglob("*") if path.name.endswith((".partial", ".tmp"))]
    names += [path for path in run.output.rglob(".*") if path.name != ".lock"]
    assert not names, names


def assert_resumes(run: Run, reference: Run, *before: Ended, ranks: int = 2) -> Ended:
    """Started again it ends well, as if nothing had been."""
    again = run.fork("--resume", "auto", ranks=ranks)
    assert again.codes == [0] * ranks, again
    assert_clean(run, *before, again)
    assert_same(run, reference)
    return again
