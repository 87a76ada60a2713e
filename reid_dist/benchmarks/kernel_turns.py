"""Measures the implementations of one cell in turns, each in its process, and makes the rows of the table."""

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reid_dist.benchmarks.kernel_peers import ROOF, Contestant, contestants
from reid_dist.benchmarks.kernel_problem import Answer, Cell
from reid_dist.benchmarks.kernel_worker import REFERENCE, load_answer

ROOT = Path(__file__).parents[2]

_NUMBERS = (
    "forward_ms",
    "total_ms",
    "least_forward_ms",
    "least_total_ms",
    "extra_bytes",
    "loss_error",
    "grad_error",
    "scale_grad_error",
    "roof_share",
)
# A turn is long enough to be timed and short enough that all see the same machine.
_TURN_MS, _MOST_REPEATS = 100.0, 20
_CUDA_REPEATS = 10
_LEAST_ROUNDS = 3
_SLOW = 4.0


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where.
        threads: of each process; only one works at a time.
        rounds: turns of each implementation; three of those that take four times as long as the roof.
        seconds: of the rounds of a cell, after which no further round begins (three there are at least).
        only: names of implementations, of which the roof is always one; empty for all.
        timeout_s: for one answer of a process.
    """

    device: torch.device
    threads: int
    rounds: int
    seconds: float
    only: tuple[str, ...] = ()
    timeout_s: float = 600.0


class WorkerError(Exception):
    """A process answered with a reason, or not at all."""


class Worker:
    """The process of one contestant (or of the float64 answers)."""

    def __init__(self, cell: Cell, key: str, settings: Settings, folder: Path) -> None:
        self._timeout = settings.timeout_s
        self._log = folder / f"{key.replace('/', '-')}.log"
        self.answer = folder / f"{key.replace('/', '-')}.pt"
        module = "reid_dist.benchmarks.kernel_worker"
        description = json.dumps(cell.as_dict())
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(settings.threads)}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, description, key, str(settings.device), str(settings.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environment,
            )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            WorkerError: it gives a reason, none in time, or has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ending()) from None
        if not select.select([self._process.stdout], [], [], self._timeout)[0]:
            raise WorkerError(f"no answer in {self._timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._ending())
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            raise WorkerError(answer["reason"])
        return answer

    def _ending(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").splitlines()
        return f"process ended with code {code}: {lines[-1][:200] if lines else 'no message'}"

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not sent is not wanted any more
                    stream.close()


@dataclass
class _Place:
    """A contestant's row in the making."""

    contestant: Contestant
    worker: Worker | None = None
    reason: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    times: list[tuple[float, float]] = field(default_factory=list)

    def leave(self, reason: str) -> None:
        """Not measured further: numbers of a broken run are worth nothing."""
        self.reason, self.times = reason, []
        self.numbers.clear()
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure_cell(cell: Cell, settings: Settings, progress: Any) -> list[dict[str, Any]]:
    """One row for each implementation; with a reason and without numbers for those that cannot run here."""
    chosen = [
        contestant
        for number, contestant in enumerate(contestants(cell))
        if number == 0 or not settings.only or contestant.name in settings.only
    ]
    places = [_Place(contestant, reason=contestant.missing(settings.device)) for contestant in chosen]
    with tempfile.TemporaryDirectory(prefix="reid_dist-benchmark-") as folder:
        try:
            _prepare(cell, places, settings, Path(folder), progress)
            _take_turns(places, settings, progress)
        finally:
            for place in places:
                if place.worker is not None:
                    place.worker.close()
    return _rows(cell, places, settings.device)


def _prepare(cell: Cell, places: list[_Place], settings: Settings, folder: Path, progress: Any) -> None:
    """Starts the processes and takes memory and errors, one after the other."""
    progress.set_postfix_str(f"{cell.op} {cell.size} {cell.dtype}: float64 answers")
    answers = _reference(cell, settings, folder)
    for place in places:
        if place.reason is None:
            place.worker = Worker(cell, place.contestant.key, settings, folder)
    for place in places:
        progress.set_postfix_str(f"{cell.op} {cell.size} {cell.dtype}: preparing {place.contestant.name}")
        progress.refresh()
        if place.worker is None:
            continue
        try:
            found = place.worker.ask(do="prepare", answer=str(place.worker.answer))
        except WorkerError as ended:
            place.leave(str(ended))
            continue
        place.numbers["extra_bytes"] = found["extra_bytes"]
        if found["answered"]:
            answer = load_answer(torch.load(place.worker.answer, map_location="cpu", weights_only=True))
            errors = answer.errors(answers[place.contestant.problem])
            if not all(error is None or math.isfinite(error) for error in errors):
                place.leave("its loss or gradient is not finite")
                continue
            place.numbers |= dict(zip(("loss_error", "grad_error", "scale_grad_error"), errors, strict=True))
            place.worker.answer.unlink()


def _reference(cell: Cell, settings: Settings, folder: Path) -> dict[str, Answer]:
    worker = Worker(cell, REFERENCE, settings, folder)
    try:
        worker.ask(do="prepare", answer=str(worker.answer))
    finally:
        worker.close()
    saved = torch.load(worker.answer, map_location="cpu", weights_only=True)
    return {problem: load_answer(answer) for problem, answer in saved.items()}


def _take_turns(places: list[_Place], settings: Settings, progress: Any) -> None:
    """Rounds in which each is measured once; another begins each time, so that no place in the round is anyone's."""
    began = time.monotonic()
    for number in range(settings.rounds):
        if number >= _LEAST_ROUNDS and time.monotonic() - began > settings.seconds:
            break
        progress.set_postfix_str(f"round {number + 1}")
        first = number % len(places)
        for place in (*places[first:], *places[:first]):
            if place.worker is not None and (number < _LEAST_ROUNDS or not _is_slow(place, places[0])):
                _turn(place, place.worker, settings.device)
    progress.update()


def _is_slow(place: _Place, roof: _Place) -> bool:
    """Far from the roof: its time needs no more measurements, the others' do."""
    return bool(roof.times) and min(place.times)[1] > _SLOW * min(roof.times)[1]


def _turn(place: _Place, worker: Worker, device: torch.device) -> None:
    last_ms = place.times[-1][1] if place.times else _TURN_MS
    if device.type == "cuda":
        repeats, warm_up = _CUDA_REPEATS, True
    else:
        repeats = max(1, min(_MOST_REPEATS, int(_TURN_MS / max(last_ms, 1e-3))))
        warm_up = last_ms < 5 * _TURN_MS or not place.times
    try:
        place.times += worker.ask(do="turn", repeats=repeats, warm_up=warm_up)["times"]
    except WorkerError as ended:
        place.leave(str(ended))


def _rows(cell: Cell, places: list[_Place], device: torch.device) -> list[dict[str, Any]]:
    for place in places:
        if place.times:
            forward, total = zip(*place.times, strict=True)
            place.numbers |= {
                "forward_ms": statistics.median(forward),
                "total_ms": statistics.median(total),
                "least_forward_ms": min(forward),
                "least_total_ms": min(total),
            }
    # On a CPU other work disturbs single calls by multiples: only the least times say what the code can do.
    measure = "total_ms" if device.type == "cuda" else "least_total_ms"
    roof = places[0].numbers.get(measure)
    for place in places:
        if roof is not None and measure in place.numbers:
            place.numbers["roof_share"] = roof / place.numbers[measure]
    return [_row(cell, place) for place in places]


def _row(cell: Cell, place: _Place) -> dict[str, Any]:
    contestant = place.contestant
    return {
        "op": cell.op,
        "backend": contestant.name,
        "mask": _mask(contestant),
        "B": cell.b,
        "K": cell.k,
        "D": cell.d,
        "dtype": cell.dtype,
        **{name: _rounded(name, place.numbers.get(name)) for name in _NUMBERS},
        "calls": len(place.times),
        "cannot": None if contestant.cannot is None else list(contestant.cannot),
        "reason": place.reason,
    }


def _mask(contestant: Contestant) -> str | None:
    """None where the question does not arise: in-batch pairs, bare products."""
    if contestant.problem == "pairs" or contestant.name in ROOF.values():
        return None
    return "identity" if contestant.problem == "identity" else "none"


def _rounded(name: str, value: float | None) -> float | int | None:
    if value is None or name == "extra_bytes":
        return value
    return round(value, 4) if name.endswith("_ms") or name == "roof_share" else float(f"{value:.3g}")
