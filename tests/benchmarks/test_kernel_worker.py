"""The processes of the kernel benchmark: their memory, their answers and their ends."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist.benchmarks import kernel_worker
from reid_dist.benchmarks.kernel_problem import Cell, make_inputs, reference_answers
from reid_dist.benchmarks.kernel_turns import Settings, Worker, WorkerError
from reid_dist.benchmarks.kernel_worker import Reference, Work, load_answer, peak_extra_bytes, serve

CPU = torch.device("cpu")
CELL = Cell("moco_nce", 16, 4096, 64, "float32")
MEGABYTE = 2**20


@pytest.mark.parametrize("megabytes", [24, 96])
def test_peak_of_a_call_that_frees_what_it_took(megabytes: int) -> None:
    def call() -> None:
        torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)
        torch.ones(megabytes * MEGABYTE // 2, dtype=torch.uint8)

    for _ in range(2):  # memory that malloc kept from the first must count again
        peak = peak_extra_bytes(call, CPU)
        assert peak is not None and megabytes * MEGABYTE * 0.98 <= peak < (megabytes + 6) * MEGABYTE


def test_peak_counts_what_is_kept_and_small_pieces() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.extend(torch.ones(MEGABYTE // 16, dtype=torch.uint8) for _ in range(16 * 30))

    peak = peak_extra_bytes(call, CPU)
    assert peak is not None and 29 * MEGABYTE < peak < 40 * MEGABYTE


def test_no_figure_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(kernel_worker.Path, "read_text", absent)
    monkeypatch.setattr(kernel_worker.Path, "write_text", absent)
    assert peak_extra_bytes(lambda: None, CPU) is None and kernel_worker.available_bytes() is None


def test_work_prepares_and_takes_turns(tmp_path: Path) -> None:
    work = Work(CELL, "naive/identity", CPU)
    found = work.prepare(str(tmp_path / "a.pt"))
    assert found["answered"] and found["extra_bytes"] > 3 * 4 * CELL.b * CELL.k
    answer = load_answer(torch.load(tmp_path / "a.pt", weights_only=True))
    true = reference_answers(make_inputs(CELL, CPU))["identity"]
    assert max(filter(None, answer.errors(true))) < 1e-5
    times = work.turn(repeats=3, warm_up=True)["times"]
    assert len(times) == 3 and all(0 < forward < total for forward, total in times)


def test_the_roof_has_no_answer(tmp_path: Path) -> None:
    # 16 MB of products: of a quarter megabyte the process may hold a page already.
    cell = Cell("moco_nce", 64, 65536, 64, "float32")
    work = Work(cell, "two_gemms/none", CPU)
    found = work.prepare(str(tmp_path / "a.pt"))
    assert not found["answered"] and not (tmp_path / "a.pt").exists()
    assert found["extra_bytes"] >= 0.99 * 4 * cell.b * cell.k
    [(forward, total)] = work.turn(repeats=1, warm_up=False)["times"]
    assert 0 < forward <= total


def test_reference(tmp_path: Path) -> None:
    assert Reference(CELL, CPU).prepare(str(tmp_path / "a.pt")) == {"problems": ["identity", "none", "target"]}
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    true = reference_answers(make_inputs(CELL, CPU))
    assert load_answer(saved["none"]).errors(true["none"]) == (0.0, 0.0, 0.0)


def test_what_would_exhaust_the_memory_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_worker, "available_bytes", lambda: 2 * 2**20)
    found = Work(CELL, "naive/identity", CPU).prepare(str(tmp_path / "a.pt"))
    assert found == {"reason": "needs about 0 GB of memory; 0 GB are available"}
    monkeypatch.setattr(kernel_worker, "available_bytes", lambda: None)
    assert "reason" not in Work(CELL, "naive/identity", CPU).prepare(str(tmp_path / "a.pt"))


def test_errors_are_answers_of_one_line() -> None:
    class Failing:
        def prepare(self, kind: str) -> dict[str, Any]:
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
            if kind == "assert":
                raise AssertionError
            raise RuntimeError("\n  first line\nsecond")

    commands = [{"do": "prepare", "kind": kind} for kind in ("memory", "assert", "other")]
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), answers, Failing())  # type: ignore[arg-type]
    found = [json.loads(line)["reason"] for line in answers.getvalue().splitlines()]
    assert found == ["out of memory", "AssertionError", "RuntimeError: first line"]


def test_process(tmp_path: Path) -> None:
    """What it answers is what the same work gives here; killed, it leaves a reason."""
    worker = Worker(CELL, "chunked/identity", Settings(CPU, 1, 1, 1.0), tmp_path)
    try:
        found = worker.ask(do="prepare", answer=str(worker.answer))
        assert found["answered"] and found["extra_bytes"] > 0
        Work(CELL, "chunked/identity", CPU).prepare(str(tmp_path / "here.pt"))
        answers = (worker.answer, tmp_path / "here.pt")
        there, here = (load_answer(torch.load(path, weights_only=True)) for path in answers)
        assert max(filter(None, there.errors(here)), default=0.0) < 1e-6
        with pytest.raises(WorkerError, match=r"TypeError: .*unexpected keyword"):
            worker.ask(do="turn", wrong=1)
        assert all(math.isfinite(total) for _, total in worker.ask(do="turn", repeats=2, warm_up=False)["times"])
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(WorkerError, match="process ended with code -9"):
            worker.ask(do="turn", repeats=1, warm_up=False)
    finally:
        worker.close()


def test_a_process_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    worker = Worker(CELL, "chunked/identity", Settings(CPU, 1, 1, 1.0, timeout_s=0.01), tmp_path)
    with pytest.raises(WorkerError, match=r"no answer in 0 s"):
        worker.ask(do="prepare", answer=str(worker.answer))
    worker.close()
    assert worker._process.poll() is not None
