"""Ranks that stand still end, and say who is missing. All cases run at once: mostly they wait."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reid_dist import distributed
from reid_dist.supervision.watchdog import Watchdog
from tests.supervision.conftest import Ranks, started

HANG_S = 3.0
FAULT_AT = 5
FAULTS = ["stop0", "stop1", "skip1", "sleep1", "gil1", "alone0", "pause1", "suspend0"]


def train(folder: Path, rank: int, fault: str) -> int:
    """Steps with two collectives, in groups of their own; the rank at the end of the fault's name has it."""
    step, second = -1, dist.new_group() if dist.is_initialized() else None
    with Watchdog(HANG_S, folder / "hang") as watchdog:
        while not (folder / "enough").exists():
            step += 1
            watchdog.at("data", step)
            time.sleep(0.01)
            has_it = step == FAULT_AT and fault.endswith(str(rank))
            if has_it:
                (folder / "fault").write_text(str(time.monotonic()))
                fail(fault[:-1], watchdog, folder)
            try:
                watchdog.at("first", step)
                if not (has_it and fault == "skip1"):
                    distributed.sum_over_ranks(torch.ones(3))
                watchdog.at("second", step)
                if second is not None:
                    dist.all_reduce(torch.ones(3), group=second)
            except RuntimeError as error:
                return 70 if distributed.is_lost_peer(error) else 1
    return 0


def fail(fault: str, watchdog: Watchdog, folder: Path) -> None:
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault in ("sleep", "alone"):
        time.sleep(60)
    if fault == "gil":
        ctypes.PyDLL(None).sleep(60)  # without letting other threads run Python
    if fault == "suspend":
        nap(0.6)  # it stands still already when the job is suspended
        (folder / "suspend").touch()
        nap(0.4)
    if fault == "pause":
        with watchdog.pause("evaluation"):
            time.sleep(HANG_S + 2)


def nap(seconds: float) -> None:
    """In short ones: a long one would be over when a suspended process goes on."""
    for _ in range(int(seconds * 100)):
        time.sleep(0.01)


@dataclass
class Case:
    """How the ranks of a fault ended: their codes, seconds after it, and what they said."""

    folder: Path
    codes: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def lines(self, rank: int) -> list[str]:
        return [line for line in self.said[rank].splitlines() if line.startswith("rank ")]

    def line(self, rank: int, words: str) -> str:
        return f"rank {rank}: no progress for 3 s in step 5, phase {words}; stacks: {self.folder / 'hang'}"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    with contextlib.ExitStack() as stack:
        worlds = {}
        for fault in FAULTS:
            folder = tmp_path_factory.mktemp(fault)
            ranks = stack.enter_context(started(folder, 1 if fault == "alone0" else 2, train, fault))
            worlds[fault] = Case(folder), ranks
        suspended = worlds["suspend0"][1]
        suspended.wait_for("suspend")
        for process in suspended.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
        watch(worlds, HANG_S + 2)
        for rank in range(2):
            suspended.signal(rank, signal.SIGCONT)
        watch(worlds, 4)
        for case, ranks in worlds.values():
            (case.folder / "enough").touch()
            case.said = [ranks.said(rank) for rank in range(len(ranks.processes))]
        watch({name: worlds[name] for name in ("pause1", "suspend0")}, 1)
        yield {fault: case for fault, (case, _) in worlds.items()}


def watch(worlds: dict[str, tuple[Case, Ranks]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for case, ranks in worlds.values():
            for rank, process in enumerate(ranks.processes):
                if rank not in case.codes and process.exitcode is not None:
                    case.codes[rank] = process.exitcode
                    case.seconds[rank] = time.monotonic() - float((case.folder / "fault").read_text())
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("fault", "speaker", "words"),
    [
        ("stop0", 1, "first; rank 0, which keeps the heartbeats, did not arrive: it is silent, stopped or cut off"),
        ("stop1", 0, "first; did not arrive: rank 1 (in step {}, phase {}, silent since: stopped or cut off)"),
        ("gil1", 0, "first; did not arrive: rank 1 (in step {}, phase {}, silent since: stopped or cut off)"),
        ("skip1", None, "{}; did not arrive: rank 1 (in step 5, phase second)"),
        ("sleep1", None, "{}; did not arrive: rank 1 (in step 5, phase data)"),
        ("alone0", 0, "data; there is no other rank"),
    ],
)
def test_one_line_names_who_did_not_arrive(cases: dict[str, Case], fault: str, speaker: int | None, words: str) -> None:
    case = cases[fault]
    who = [speaker] if speaker is not None else [0, 1]  # whose clock is ahead a little
    lines = [(rank, line) for rank in who for line in case.lines(rank)]
    assert len(lines) == 1, case.said
    start, end = words.split("{}")[0], words.split("{}")[-1]
    rank, line = lines[0]
    assert line.startswith(case.line(rank, start).split("; stacks")[0]), line
    assert line.endswith(f"{end}; stacks: {case.folder / 'hang'}"), line


@pytest.mark.parametrize("fault", ["stop0", "stop1", "skip1", "sleep1", "gil1", "alone0"])
def test_all_end_in_bounded_time(cases: dict[str, Case], fault: str) -> None:
    case = cases[fault]
    stopped = int(fault[-1]) if fault.startswith("stop") else None
    ranks = [rank for rank in range(1 if fault == "alone0" else 2) if rank != stopped]
    assert sorted(case.codes) == ranks
    assert all(case.seconds[rank] <= HANG_S + 5 for rank in ranks), case.seconds
    # Where no Python runs any more the interpreter ends it, with a code of its own.
    expected = {rank: {1} if (fault, rank) == ("gil1", 1) else {71, 70} for rank in ranks}
    assert all(case.codes[rank] in expected[rank] for rank in ranks), case.codes
    assert 71 in case.codes.values()


def test_stacks_of_all_threads_are_kept(cases: dict[str, Case]) -> None:
    for rank, what in enumerate(["sum_over_ranks", "in fail"]):
        text = (cases["sleep1"].folder / "hang" / f"rank-{rank}.txt").read_text()
        assert "most recent call first" in text and what in text
        assert what in cases["sleep1"].said[rank]
    assert "in fail" in cases["gil1"].said[1]


@pytest.mark.parametrize("fault", ["pause1", "suspend0"])
def test_what_is_meant_to_take_long_is_left_alone(cases: dict[str, Case], fault: str) -> None:
    """A pause; and a scheduler that suspends the whole job, however long."""
    assert cases[fault].said == ["", ""]
    assert cases[fault].codes in ({0: 0, 1: 0}, {0: 70, 1: 0}, {0: 0, 1: 70})  # who leaves first leaves the other alone
