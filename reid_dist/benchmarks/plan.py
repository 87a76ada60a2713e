"""The plan of `launch/train.py --plan` beside what this machine does: `benchmark.py plan --json OUT [CONFIG]`.

First the machine's own rates, on all ranks at once: a large matrix product, a large copy, an operation on one number,
and all-reduces of a few bytes and of many. Then each stage trains on made-up batches in a bare loop over its engine.
The plan gets the rates in place of its assumptions, with a utilisation of 1: `predicted` is what the machine would do
if every operation ran as well as those. `carried` is the prediction for more ranks with forwards and backwards
stretched as those of the stage were on one rank: what is left of the error then is communication's and the ranks'.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from reid_dist import distributed
from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.loops import EngineLoop, Trained, add_trained_arguments, build_of, require_positive
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.ranks import measure_on_ranks
from reid_dist.engine import prepare_environment
from reid_dist.files import write_results
from reid_dist.planning.assumptions import Assumptions
from reid_dist.planning.estimate import estimate_stage
from reid_dist.recipe_file import load_config
from reid_dist.supervision.leaving import remove_own_shared_memory

_WARM_UP = 3
_PRODUCT, _COPIED, _REDUCED = 1024, 1 << 26, 1 << 22  # sides; elements


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        trained: what is trained.
        steps: that are timed.
        repeats: of each measurement of the machine.
    """

    trained: Trained
    steps: int
    repeats: int


class Machine:
    """Rates of this rank while all others measure the same."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def rates(self) -> dict[str, float]:
        """What `Assumptions` wants; the slowest rank's."""
        found = {
            "fp32_tflops": self._tflops(torch.float32),
            "bf16_tflops": self._tflops(torch.bfloat16),
            "memory_gbs": self._memory_gbs(),
            "operation_us": self._operation_us(),
        }
        latency_us, gbs = self._links()
        near = {"near_us": latency_us, "far_us": latency_us, "near_gbs": gbs, "far_gbs": gbs}
        return {name: float(f"{value:.4g}") for name, value in {**found, **near}.items()}

    def _seconds(self, call: Callable[[], object], times: int = 1) -> float:
        """Median time of so many calls; of ranks the slowest's."""
        found = []
        for _ in range(self._repeats + 1):
            self._synchronize()
            distributed.barrier()
            began = time.perf_counter()
            for _ in range(times):
                call()
            self._synchronize()
            found.append(time.perf_counter() - began)
        median = torch.tensor([statistics.median(found[1:])], dtype=torch.float64, device=self._device)
        return float(distributed.all_gather(median).max())

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _tflops(self, dtype: torch.dtype) -> float:
        side = _PRODUCT * (8 if self._device.type == "cuda" else 1)
        x = torch.randn(side, side, device=self._device).to(dtype)
        return 2 * side**3 / self._seconds(lambda: x @ x) / 1e12

    def _memory_gbs(self) -> float:
        x = torch.zeros(_COPIED, device=self._device)
        y = torch.empty_like(x)
        return 2 * x.nbytes / self._seconds(lambda: y.copy_(x)) / 1e9

    def _operation_us(self) -> float:
        x = torch.zeros(1, device=self._device)
        return self._seconds(lambda: x.add_(1), 500) / 500 * 1e6

    def _links(self) -> tuple[float, float]:
        """Latency of a step of a collective in us, and GB/s of each rank; of one rank what no plan reads."""
        ranks = distributed.world_size()
        if ranks == 1:
            return 1.0, 1.0
        little, much = torch.zeros(1, device=self._device), torch.zeros(_REDUCED, device=self._device)

        def reduce(x: Tensor) -> Callable[[], object]:
            return lambda: dist.all_reduce(x)

        least = self._seconds(reduce(little), 50) / 50
        sent = 2 * much.nbytes * (ranks - 1) / ranks
        return least * 1e6 / (2 * math.log2(ranks)), sent / max(1e-9, self._seconds(reduce(much)) - least) / 1e9


def measure(case: Case) -> dict[str, Any]:
    """The rates and the time of a step; every rank of an initialised group calls it."""
    device = prepare_environment()
    rates = Machine(device, case.repeats).rates()
    engine = build_of(case.trained, device)
    engine.stage.start(engine.exact_parameters)
    loop, batches = EngineLoop(engine, device), case.trained.batches(engine.stage, 2)
    seconds = []
    for step in range(_WARM_UP + case.steps):
        distributed.barrier()
        began = time.perf_counter()
        loop.step(batches[step % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    engine.close()
    remove_own_shared_memory()
    steps = torch.tensor(seconds[_WARM_UP:], dtype=torch.float64, device=device)
    if distributed.world_size() > 1:
        dist.all_reduce(steps, dist.ReduceOp.MAX)
    return {"rates": rates, "measured_ms": 1e3 * float(steps.median()), "threads": torch.get_num_threads()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py plan`."""
    add_trained_arguments(parser)
    parser.add_argument("--stage", nargs="+", help="of the recipe (default: all)")
    parser.add_argument("--zero", nargs="+", type=int, default=[1], help="ZeRO stages (default: 1)")
    parser.add_argument("--steps", type=int, default=40, help="that are timed (default: 40)")
    parser.add_argument("--repeats", type=int, default=10, help="of the machine's rates (default: 10)")


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """What is measured.

    Raises:
        UserError: options out of range, or a stage that cannot be measured.
    """
    require_positive(options, "steps", "repeats", "ranks")
    found = []
    for zero in options.zero:
        config = load_config(options.config, [*options.set, f"engine.zero_stage={zero}"])
        for name in options.stage or [stage.name for stage in config.stages]:
            found += [
                Case(Trained(config, name, n), options.steps, options.repeats) for n in sorted(set(options.ranks))
            ]
    for case in found:
        case.trained.check()
    return found


def predicted(case: Case, rates: dict[str, float]) -> dict[str, float]:
    """Parts of a step in ms, with the machine's rates as they are; called when nothing is measured any more."""
    trained = case.trained
    assumed = Assumptions(**rates, utilisation=1.0)
    choice = estimate_stage(trained.config, trained.stage, 1, trained.ranks, assumed).choices[
        trained.stage.engine.zero_stage
    ]
    parts = {"compute": choice.compute_s, "update": choice.update_s, "exchange": choice.exchange_s}
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def compared(cases: list[Case], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows: prediction and measurement, and the prediction for more ranks from what one rank did."""
    rows: list[dict[str, Any]] = []
    stretched: dict[tuple[str, int], float] = {}
    for case, found in zip(cases, measured, strict=True):
        stage, parts = case.trained.stage, predicted(case, found["rates"])
        beside = parts["update"] + parts["exchange"]
        own = (stage.name, stage.engine.zero_stage)
        if case.trained.ranks == 1:
            stretched[own] = max(0.0, found["measured_ms"] - beside) / parts["compute"]
        row = {
            "stage": stage.name,
            "zero_stage": stage.engine.zero_stage,
            "ranks": case.trained.ranks,
            "rows": case.trained.rows,
            **{f"{name}_ms": round(ms, 3) for name, ms in parts.items()},
            "predicted_ms": round(beside + parts["compute"], 3),
            "measured_ms": round(found["measured_ms"], 3),
            "rates": found["rates"],
            "threads": found["threads"],
        }
        if case.trained.ranks > 1 and own in stretched:
            row["carried_ms"] = round(beside + parts["compute"] * stretched[own], 3)
        rows.append(row)
    for row, case in zip(rows, cases, strict=True):
        batch = case.trained.stage.data.global_batch_size
        for name in ("predicted", "measured", "carried"):
            if f"{name}_ms" in row:
                row[f"{name}_samples_per_s"] = round(1e3 * batch / row[f"{name}_ms"], 1)
    return rows


_COLUMNS = {
    "stage": ("stage", 12, "s"),
    "zero_stage": ("ZeRO", 5, "d"),
    "ranks": ("ranks", 6, "d"),
    "compute_ms": ("compute", 9, ".1f"),
    "update_ms": ("update", 8, ".1f"),
    "exchange_ms": ("exchange", 9, ".1f"),
    "predicted_ms": ("predicted", 10, ".1f"),
    "carried_ms": ("carried", 8, ".1f"),
    "measured_ms": ("measured ms", 12, ".1f"),
    "predicted_samples_per_s": ("predicted /s", 13, ",.0f"),
    "carried_samples_per_s": ("carried /s", 11, ",.0f"),
    "measured_samples_per_s": ("measured /s", 12, ",.0f"),
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = ["".join(f"{title:>{width}}" for title, width, _ in _COLUMNS.values())]
    for row in rows:
        cells = (
            f"{f'{row[key]:{form}}' if key in row else '-':>{width}}" for key, (_, width, form) in _COLUMNS.items()
        )
        lines.append("".join(cells))
    for ranks in sorted({row["ranks"] for row in rows}):
        rates = next(row["rates"] for row in rows if row["ranks"] == ranks)
        known = {name: rate for name, rate in rates.items() if ranks > 1 or not name.startswith(("near", "far"))}
        lines.append(f"rates of a rank, {ranks} at once: {' '.join(f'{k}={v:g}' for k, v in known.items())}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure, predict, print the table and write the file.

    Raises:
        UserError: wrong options, or a file that cannot be written.
    """
    cases = choose_cases(options)
    check_writable("--json", options.json)
    machine = describe_machine()  # its load before ours
    cores = len(os.sched_getaffinity(0))
    measured = [
        measure_on_ranks("plan", case.trained.ranks, max(1, cores // case.trained.ranks), measure, case)
        for case in tqdm(cases, desc="benchmark: stages", disable=None)
    ]
    rows = compared(cases, measured)
    write_results(options.json, {"rows": rows, "settings": {"config": str(options.config)}, "machine": machine})
    print(f"{table(rows)}\nwritten: {options.json}")
