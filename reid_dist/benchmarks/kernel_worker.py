"""One implementation in a process of its own: `python -m reid_dist.benchmarks.kernel_worker CELL NAME DEVICE THREADS`.

Takes commands as lines of JSON and answers each with one; `kernel_turns.Worker` is the other end. A process of its own
lets each have its memory measured, and a crash or an exhausted memory ends one row, not the run.

Memory of a call, forward and backward, beyond the inputs:

- on a GPU the allocator's peak (max_memory_allocated);
- on a CPU the peak of the resident set (VmHWM, reset through /proc/self/clear_refs) above what was resident before,
  after a call at a tiny size has loaded the libraries, while glibc returns free memory at once. It counts what no
  allocator of torch's sees.

The first call counts, with the workspace that it may keep; of what compiles, the second.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from reid_dist.benchmarks.kernel_peers import contestants
from reid_dist.benchmarks.kernel_plain import Step
from reid_dist.benchmarks.kernel_problem import Answer, Cell, Inputs, make_inputs, reference_answers

REFERENCE = "float64"


class Work:
    """The contestant at work on its cell."""

    def __init__(self, cell: Cell, key: str, device: torch.device) -> None:
        found = [contestant for contestant in contestants(cell) if contestant.key == key]
        self._contestant = found[0]
        self._cell = cell
        self._device = device
        self._inputs: Inputs | None = None
        self._step: Step | None = None
        self._loss: Tensor | None = None

    def prepare(self, answer: str) -> dict[str, Any]:
        """Makes the inputs, takes memory from a first call and saves its answer."""
        reason = self._contestant.missing(self._device) or self._too_large()
        if reason:
            return {"reason": reason}
        if not self._contestant.compiles:
            self._load_libraries()
        self._inputs = make_inputs(self._cell, self._device)
        if self._contestant.compiles:
            self._step = self._contestant.build(self._inputs)
            _call(self._step, self._inputs)
        extra = peak_extra_bytes(self._first_call, self._device)
        if self._loss is not None:
            gradients = [leaf.grad for leaf in self._inputs.leaves]
            torch.save({"loss": self._loss, "gradients": gradients}, answer)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        return {"extra_bytes": extra, "answered": self._loss is not None}

    def _load_libraries(self) -> None:
        """Calls at a small size: threads, handles and code are there before memory is measured."""
        b, k = min(self._cell.b, 128), min(self._cell.k, 256)
        small = make_inputs(replace(self._cell, b=b, k=b if self._cell.op == "clip_contrastive" else k), self._device)
        for _ in range(2):
            _call(self._contestant.build(small), small)

    def _first_call(self) -> None:
        assert self._inputs is not None
        if self._step is None:
            self._step = self._contestant.build(self._inputs)
        self._loss = _call(self._step, self._inputs)

    def _too_large(self) -> str | None:
        """On a CPU: the system would not refuse the memory but end some process."""
        if self._device.type != "cpu":
            return None
        needed = self._contestant.logit_bytes * self._cell.b * self._cell.k + 2 * self._cell.input_bytes
        available = available_bytes()
        if available is None or needed < available:
            return None
        return f"needs about {needed / 1e9:.0f} GB of memory; {available / 1e9:.0f} GB are available"

    def turn(self, repeats: int, warm_up: bool) -> dict[str, Any]:
        """Milliseconds of the forward, and of forward and backward, of each of some calls."""
        assert self._step is not None and self._inputs is not None
        if warm_up:
            _call(self._step, self._inputs)
        measure = _measure_cuda if self._device.type == "cuda" else _measure_cpu
        times = measure(self._step, self._inputs, repeats)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        return {"times": times}


class Reference:
    """The float64 answers."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self._cell, self._device = cell, device

    def prepare(self, answer: str) -> dict[str, Any]:
        """Saves them all."""
        answers = reference_answers(make_inputs(self._cell, self._device))
        saved = {problem: {"loss": a.loss, "gradients": a.gradients} for problem, a in answers.items()}
        torch.save(saved, answer)
        return {"problems": sorted(saved)}


def load_answer(saved: dict[str, Any]) -> Answer:
    """What `prepare` saved of an answer."""
    return Answer(saved["loss"], saved["gradients"])


def _clear(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def _call(step: Step, inputs: Inputs) -> Tensor | None:
    """The loss of one forward, after the backward."""
    _clear(inputs)
    loss = step()
    if loss is None:
        return None
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _measure_cpu(step: Step, inputs: Inputs, repeats: int) -> list[tuple[float, float]]:
    times = []
    for _ in range(repeats):
        _clear(inputs)
        began = time.perf_counter()
        loss = step()
        middle = time.perf_counter()
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        times.append(((middle - began) * 1e3, (time.perf_counter() - began) * 1e3))
        del loss
    return times


def _measure_cuda(step: Step, inputs: Inputs, repeats: int) -> list[tuple[float, float]]:
    """By events; all calls are queued before the first is waited for, so that launches overlap as in training."""
    marks = []
    for _ in range(repeats):
        _clear(inputs)
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(3)
        ]
        events[0].record()
        loss = step()
        events[1].record()
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        events[2].record()
        marks.append(events)
        del loss
    torch.cuda.synchronize()
    return [(begin.elapsed_time(middle), begin.elapsed_time(end)) for begin, middle, end in marks]


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of a call beyond what is held before it; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_memory_back_at_once()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    resident = _status("VmRSS")
    call()
    peak = _status("VmHWM")
    _give_memory_back_seldom()
    return None if resident is None or peak is None else max(0, peak - resident)


# Of glibc; other C libraries have no such calls, and their figures may miss memory that was kept.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def _give_memory_back_at_once() -> None:
    """Free pages go back to the system now, blocks from here on when they are freed: what malloc keeps is not use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**17)


def _give_memory_back_seldom() -> None:
    """As in a process that has run for a while: glibc raises its thresholds to these by itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**25)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 2**26)


def _status(name: str) -> int | None:
    """Bytes that /proc/self/status says; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
    return values[0] if values else None


def available_bytes() -> int | None:
    """Main memory that is free or can be freed; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return values[0] if values else None


def serve(commands: TextIO, answers: TextIO, work: Work | Reference) -> None:
    """Answers until there are no more commands; an error is an answer too, a CUDA error the last one."""
    for line in commands:
        command = json.loads(line)
        try:
            answer = getattr(work, command.pop("do"))(**command)
        except torch.OutOfMemoryError:
            answer = {"reason": "out of memory"}
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            answer = {"reason": f"{type(error).__name__}: {_first_line(str(error))}".removesuffix(": ")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def main() -> None:
    """The process: commands on standard input; what libraries print goes to standard error."""
    description, key, device_name, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    cell, device = Cell(**json.loads(description)), torch.device(device_name)
    serve(sys.stdin, answers, Reference(cell, device) if key == REFERENCE else Work(cell, key, device))


if __name__ == "__main__":
    main()
