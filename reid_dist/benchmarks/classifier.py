"""Identity classifiers of many classes, dense beside sharded: `benchmark.py classifier --json OUT`.

The command starts the ranks itself: gloo processes on the CPU, or one for each GPU where there are enough. A step is
loss, gradients of features and weights, and AdamW, of random features. Dense: `nn.Linear` on every rank, gradients
averaged by an all-reduce, torch's optimizer. Sharded: `models.sharded_classifier`, all classes or a sample. Times are
the slowest rank's: the least wall time of the steps and, for machines that do other work, processor time. Memory is the
peak of making the classifier and its first step. What does not fit is listed with what it would need.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reid_dist import distributed
from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.kernel_worker import available_bytes, peak_extra_bytes
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.ranks import measure_on_ranks
from reid_dist.errors import UserError
from reid_dist.files import write_results
from reid_dist.losses.sharded_identity import sharded_identity_loss
from reid_dist.models.row_optimizer import RowOptimizer
from reid_dist.models.sharded_classifier import ShardedClassifier

_LR, _DECAY, _SMOOTHING = 1e-3, 0.01, 0.1


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        ranks: processes.
        identities: classes.
        rate: of sampling; None: the dense classifier.
        rows: of a rank and step.
        features: of a row.
        steps: that are measured.
        threads: of each process.
    """

    ranks: int
    identities: int
    rate: float | None
    rows: int
    features: int
    steps: int
    threads: int

    @property
    def needed_bytes(self) -> int:
        """About the peak of all ranks: weights, gradients, moments and temporaries, logits and what is made of them."""
        per_rank = 1 if self.rate is None else 1 / self.ranks
        # Dense: copies of the weights' size in AdamW and in the all-reduce; sharded: of a block of rows.
        weights = 6.0 if self.rate is None else 3 + (1 if self.rate == 1 else 2 * self.rate)
        rows = self.rows * (1 if self.rate is None else self.ranks)
        logits = (3 if self.rate is None else 1) * rows * (self.rate or 1)
        return int(self.ranks * per_rank * self.identities * 4 * (weights * self.features + logits))


def measure(case: Case) -> dict[str, Any]:
    """The row of a case; every rank of an initialised group calls it."""
    device = distributed.local_device()
    generator = torch.Generator().manual_seed(distributed.rank())
    feature_BD = torch.randn(case.rows, case.features, generator=generator).to(device).requires_grad_()
    label_B = torch.randint(case.identities, (case.rows,), generator=generator).to(device)
    _timed(_step(replace(case, identities=case.ranks), device), feature_BD, label_B % case.ranks, device)  # imports
    made: list[Callable[[Tensor, Tensor], None]] = []

    def first_step() -> None:
        made.append(_step(case, device))
        _timed(made[0], feature_BD, label_B, device)

    peak = peak_extra_bytes(first_step, device)
    times = [_timed(made[0], feature_BD, label_B, device) for _ in range(case.steps)]
    wall, processor = (min(column) for column in zip(*times, strict=True))
    slowest = torch.tensor([wall, processor, peak or 0], dtype=torch.float64, device=device)
    if distributed.world_size() > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return _row(case, device.type, *slowest.tolist())


def _row(case: Case, device: str, wall: float | None, processor: float | None, peak: float | None) -> dict[str, Any]:
    return {
        "ranks": case.ranks,
        "layout": "dense" if case.rate is None else "sharded",
        "identities": case.identities,
        "rate": 1.0 if case.rate is None else case.rate,
        "D": case.features,
        "rows": case.rows,
        "device": device,
        "threads": case.threads,
        "step_ms": None if wall is None else round(wall, 1),
        "processor_ms": None if processor is None else round(processor, 1),
        "peak_bytes": None if peak is None else int(peak),
        "needed_bytes": case.needed_bytes // case.ranks,
    }


def _step(case: Case, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """What is timed."""
    return _dense_step(case, device) if case.rate is None else _sharded_step(case, device)


def _dense_step(case: Case, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    layer = nn.Linear(case.features, case.identities, bias=False, device=device)
    nn.init.normal_(layer.weight, std=0.001)
    optimizer = torch.optim.AdamW(layer.parameters(), _LR, weight_decay=_DECAY)

    def step(feature_BD: Tensor, label_B: Tensor) -> None:
        loss = F.cross_entropy(layer(feature_BD), label_B, label_smoothing=_SMOOTHING)
        loss.backward()  # type: ignore[no-untyped-call]
        assert layer.weight.grad is not None
        if distributed.world_size() > 1:
            dist.all_reduce(layer.weight.grad)
            layer.weight.grad /= distributed.world_size()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sharded_step(case: Case, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    assert case.rate is not None
    optimizer = RowOptimizer("adamw", _LR, _DECAY)
    classifier = ShardedClassifier(case.identities, case.features, optimizer, rate=case.rate, device=device)

    def step(feature_BD: Tensor, label_B: Tensor) -> None:
        weight_SD, class_S = classifier.centres(label_B)
        loss = sharded_identity_loss(feature_BD, label_B, weight_SD, class_S, _SMOOTHING)
        loss.backward()  # type: ignore[no-untyped-call]
        del weight_SD
        classifier.step()

    return step


def _timed(
    step: Callable[[Tensor, Tensor], None], feature_BD: Tensor, label_B: Tensor, device: torch.device
) -> tuple[float, float]:
    """Wall and processor milliseconds; all ranks begin together."""
    feature_BD.grad = None
    distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    step(feature_BD, label_B)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py classifier`."""
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument(
        "--identities", nargs="+", type=int, default=[100_000, 1_000_000], help="default: 100000 1000000"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 0.1], help="of sampling (default: 1 0.1)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2], help="numbers of processes (default: 2)")
    parser.add_argument("--rows", type=int, default=64, help="of a rank and step (default: 64)")
    parser.add_argument("--features", type=int, default=512, help="of a row (default: 512)")
    parser.add_argument("--steps", type=int, default=3, help="that are measured (default: 3)")


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """What is measured: dense, then each rate, for each number of identities and ranks.

    Raises:
        UserError: options out of range.
    """
    for name in ("identities", "rates", "ranks", "rows", "features", "steps"):
        found = getattr(options, name)
        for value in found if isinstance(found, list) else [found]:
            if not 0 < value < float("inf") or (name == "rates" and value > 1):
                raise UserError(f"--{name} {value}: must be above 0{' and at most 1' if name == 'rates' else ''}")
    cores = len(os.sched_getaffinity(0))
    return [
        Case(ranks, identities, rate, options.rows, options.features, options.steps, max(1, cores // ranks))
        for ranks in dict.fromkeys(options.ranks)
        for identities in dict.fromkeys(options.identities)
        for rate in (None, *dict.fromkeys(options.rates))
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "measured here, per step:",
        f"  {'ranks':>5} {'identities':>11} {'layout':<8}{'rate':>6}{'wall ms':>11}{'processor ms':>14}"
        f"{'peak GB per rank':>18}{'computed':>10}",
    ]
    for row in rows:
        measured = (
            f"{row['step_ms']:>11,.0f}{row['processor_ms']:>14,.0f}{row['peak_bytes'] / 1e9:>18.2f}"
            if row["step_ms"] is not None
            else f"{'does not fit':>43}"
        )
        lines.append(
            f"  {row['ranks']:>5} {row['identities']:>11,} {row['layout']:<8}{row['rate']:>6g}{measured}"
            f"{row['needed_bytes'] / 1e9:>10.2f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        UserError: wrong options or a file that cannot be written.
    """
    cases = choose_cases(options)
    check_writable("--json", options.json)
    machine = describe_machine()  # its load before ours
    found = [_measured(case) for case in tqdm(cases, desc="benchmark: classifiers", disable=None)]
    settings = {name: asdict(cases[0])[name] for name in ("rows", "features", "steps")}
    write_results(options.json, {"rows": found, "settings": settings, "machine": machine})
    print(f"{table(found)}\nwritten: {options.json}")


def _measured(case: Case) -> dict[str, Any]:
    on_gpus = torch.cuda.device_count() >= case.ranks
    available = None if on_gpus else available_bytes()
    if available is not None and case.needed_bytes > 0.9 * available:
        return _row(case, "cpu", None, None, None)
    return measure_on_ranks("classifier", case.ranks, case.threads, measure, case)
