"""Gather and enqueue of the key queue on 1, 2 and 4 ranks, beside a cost model: `benchmark.py queue --json OUT`.

The command starts the ranks itself: gloo processes on the CPU, or one for each GPU where there are enough. A step
gathers both modalities' keys with their ids and commits them. Times are the slowest rank's, medians over steps after a
warm-up. `exposed`, of least times, is what the gather adds to a step whose anchors' encoder (a chain of matrix
products) runs meanwhile; on a CPU the ranks and gloo's threads share the cores, so that less is hidden than on GPUs.
`attend` is the queue's loss of one modality, forward and backward, with the exchange of a sharded queue. The cost model
(cost_model.py) is arithmetic.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reid_dist import distributed
from reid_dist.benchmarks.cost_model import model, model_table
from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.kernel_problem import DTYPES
from reid_dist.benchmarks.kernel_worker import available_bytes
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.plot import check_plot, plot_queue
from reid_dist.benchmarks.ranks import measure_on_ranks
from reid_dist.errors import UserError
from reid_dist.files import write_results
from reid_dist.models.queue import FeatureQueue, PendingKeys

_WARM_UP = 3
_PRODUCT = 384  # features of the dummy encoder's layers


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        ranks: processes.
        sharded: layout of the queue.
        rows: of a rank and step.
        size: keys of the queue.
        features: of a key.
        dtype: of the stored keys, a name of `DTYPES`.
        steps: that are measured.
        encoder_ms: about how long the dummy encoder runs.
        threads: of each process.
    """

    ranks: int
    sharded: bool
    rows: int
    size: int
    features: int
    dtype: str
    steps: int
    encoder_ms: float
    threads: int


class _Step:
    """The parts of a training step that the queue has to do with, on one rank."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.device = distributed.local_device()
        dtype = DTYPES[case.dtype]
        self.queue = FeatureQueue(
            case.size, case.features, case.rows, sharded=case.sharded, dtype=dtype, device=self.device
        )
        generator = torch.Generator().manual_seed(distributed.rank())

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        self._image_BD = F.normalize(normal(case.rows, case.features), dim=1)
        self._text_BD = F.normalize(normal(case.rows, case.features), dim=1)
        self._ids_B = torch.randint(case.size, (case.rows,), generator=generator).to(self.device)
        self._anchors_BD = self._text_BD.clone().requires_grad_()
        self._log_scale = torch.tensor(2.66, device=self.device, requires_grad=True)
        self._layer = normal(_PRODUCT, _PRODUCT) / _PRODUCT**0.5
        self._activations = normal(case.rows, _PRODUCT)
        self._layers = 1
        self.pending: PendingKeys | None = None
        self._fit_encoder()

    def _fit_encoder(self) -> None:
        """Takes as many layers as run for about the wanted time alone on this rank."""
        self._layers = 20
        self.encode()
        best = min(self.timed(self.encode) for _ in range(10)) / self._layers
        layers = torch.tensor([max(1, round(self._case.encoder_ms / best))], device=self.device)
        # All ranks wait for the slowest anyway: one number for all.
        self._layers = int(distributed.all_gather(layers).max())

    def encode(self) -> None:
        """The dummy encoder."""
        x = self._activations
        for _ in range(self._layers):
            x = x @ self._layer

    def start(self) -> None:
        """Starts the gather."""
        self.pending = self.queue.gather(self._image_BD, self._text_BD, self._ids_B)

    def gather(self) -> None:
        """A gather that nothing hides."""
        self.start()
        self.wait()

    def wait(self) -> None:
        """Waits for the gather."""
        assert self.pending is not None
        self.pending.wait()

    def hidden(self) -> None:
        """A gather behind the encoder."""
        self.start()
        self.encode()
        self.wait()

    def commit(self) -> None:
        """Enqueues what was gathered last."""
        assert self.pending is not None
        self.queue.commit([self.pending])

    def attend(self) -> None:
        """Forward and backward of one modality's loss."""
        lse_B = self.queue.lse(self._anchors_BD, "image", self._ids_B, self._log_scale)
        lse_B.mean().backward()  # type: ignore[no-untyped-call]

    def timed(self, call: Callable[[], None]) -> float:
        """Milliseconds; all ranks begin together."""
        distributed.barrier()
        self._synchronize()
        began = time.perf_counter()
        call()
        self._synchronize()
        return (time.perf_counter() - began) * 1e3

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


_PARTS = ("gather", "commit", "encode", "hidden", "attend")


def measure(case: Case) -> dict[str, Any]:
    """The row of a case; every rank of an initialised group calls it."""
    step = _Step(case)
    times: list[list[float]] = []
    for number in range(_WARM_UP + case.steps):
        found = [step.timed(getattr(step, part)) for part in _PARTS]
        if number >= _WARM_UP:
            times.append(found)
    slowest = torch.tensor(times, device=step.device)  # steps x parts
    if distributed.world_size() > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    columns = {part: slowest[:, number].tolist() for number, part in enumerate(_PARTS)}
    medians = {part: statistics.median(column) for part, column in columns.items()}
    # Of least times: on a shared CPU the encoder's own time varies by more than a gather takes.
    exposed = min(columns["hidden"]) - min(columns["encode"])
    row_bytes = 2 * case.features * DTYPES[case.dtype].itemsize + 4
    return {
        "ranks": case.ranks,
        "layout": "sharded" if case.sharded else "replicated",
        "rows": case.rows,
        "K": case.size,
        "D": case.features,
        "dtype": case.dtype,
        "device": step.device.type,
        "threads": case.threads,
        "gather_ms": round(medians["gather"], 3),
        "least_gather_ms": round(min(columns["gather"]), 3),
        "commit_ms": round(medians["commit"], 3),
        "encoder_ms": round(medians["encode"], 3),
        "exposed_ms": round(max(0.0, exposed), 3),
        "attend_ms": round(medians["attend"], 3),
        "sent_bytes": (case.ranks - 1) * case.rows * row_bytes,
        "storage_bytes": step.queue.nbytes,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py queue`."""
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument("--plot", type=Path, help="picture to draw, such as queue.png (needs reid_dist[plot])")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="numbers of processes (default: 1 2 4)")
    parser.add_argument("--rows", type=int, default=256, help="of a rank and step (default: 256)")
    parser.add_argument("--size", type=int, default=65536, help="keys of the queue (default: 65536)")
    parser.add_argument("--features", type=int, default=512, help="of a key (default: 512)")
    parser.add_argument("--dtype", default="bfloat16", help=f"of the keys: {' or '.join(DTYPES)} (default: bfloat16)")
    parser.add_argument("--steps", type=int, default=20, help="that are measured (default: 20)")
    parser.add_argument("--encoder-ms", type=float, default=50, help="of the dummy encoder (default: about 50)")


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """What is measured: both layouts for each number of ranks.

    Raises:
        UserError: options out of range, or more than fits the memory.
    """
    for name in ("rows", "size", "features", "steps", "encoder_ms"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above 0")
    for ranks in options.ranks:
        if ranks < 1:
            raise UserError(f"--ranks {ranks}: must be above 0")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: not known; there are {', '.join(DTYPES)}")
    # Two rings, and a float32 copy of one that a plain backend may make.
    stored = options.size * options.features * (2 * DTYPES[options.dtype].itemsize + 4)
    available = available_bytes()
    for ranks in options.ranks:
        if available is not None and ranks * stored > available:
            raise UserError(
                f"--size {options.size}: {ranks} replicas need about {ranks * stored / 1e9:.0f} GB,"
                f" {available / 1e9:.0f} GB are available; choose a smaller queue or fewer --ranks"
            )
    cores = len(os.sched_getaffinity(0))
    return [
        Case(
            ranks,
            sharded,
            options.rows,
            options.size,
            options.features,
            options.dtype,
            options.steps,
            options.encoder_ms,
            max(1, cores // ranks),
        )
        for ranks in dict.fromkeys(options.ranks)
        for sharded in (False, True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "measured here, per step:",
        f"  {'ranks':>5} {'layout':<11}{'gather ms':>11}{'exposed':>9}{'encoder':>9}{'commit ms':>11}{'attend ms':>11}"
        f"{'sent MB':>10}{'stored MB':>11}",
    ]
    for row in rows:
        lines.append(
            f"  {row['ranks']:>5} {row['layout']:<11}{row['gather_ms']:>11,.2f}{row['exposed_ms']:>9,.2f}"
            f"{row['encoder_ms']:>9,.1f}{row['commit_ms']:>11,.2f}{row['attend_ms']:>11,.1f}"
            f"{row['sent_bytes'] / 1e6:>10,.2f}{row['storage_bytes'] / 1e6:>11,.1f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure, print both tables and write the files.

    Raises:
        UserError: wrong options or files that cannot be written.
    """
    cases = choose_cases(options)
    check_writable("--json", options.json)
    if options.plot:
        check_plot(options.plot)
    machine = describe_machine()  # its load before ours
    found = [
        measure_on_ranks("queue", case.ranks, case.threads, measure, case)
        for case in tqdm(cases, desc="benchmark: layouts", disable=None)
    ]
    expected = model()
    settings = {name: value for name, value in asdict(cases[0]).items() if name not in ("ranks", "sharded", "threads")}
    write_results(options.json, {"rows": found, "model": expected, "settings": settings, "machine": machine})
    print(f"{table(found)}\n\n{model_table(expected)}")
    if options.plot:
        plot_queue(found, options.plot)
        print(f"written: {options.plot}")
    print(f"written: {options.json}")
