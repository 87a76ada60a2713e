"""What a training step costs beside the model: `benchmark.py step --json OUT [CONFIG]`, on 1 and 2 ranks.

Four loops train the same stage on the same made-up batches: our trainer with all that goes along (schedule, guard,
stop agreement, watchdog, log); a bare loop over the same engine; torch's DDP; and torch alone, which on several ranks
averages no gradients. They take turns of a few steps within one run, in changing order, and shares are medians over
the turns of ratios within a turn: what else runs on the machine meets all of them. A turn begins with a step that is
not timed. `trainer` over `engine` is our own share, `engine` over `plain` that of DeepSpeed (or of backend torch).
Saving is not in it: `benchmark.py checkpoint`. On GPUs where there are as many as ranks.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from reid_dist import distributed
from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.loops import (
    EngineLoop,
    Loop,
    TorchLoop,
    Trained,
    add_trained_arguments,
    build_of,
    require_positive,
)
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.ranks import measure_on_ranks
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.data.bad_samples import BadSamples
from reid_dist.engine import Engine, prepare_environment
from reid_dist.files import write_results
from reid_dist.guard import Guard
from reid_dist.metrics import StageLog
from reid_dist.recipe_file import load_config
from reid_dist.stages import Batch
from reid_dist.supervision.agreement import StopAgreement
from reid_dist.supervision.leaving import remove_own_shared_memory
from reid_dist.supervision.signals import StopRequest
from reid_dist.supervision.watchdog import Watchdog
from reid_dist.trainer import Companions, train
from reid_dist.training_state import TrainingState

TRAINER, ENGINE = "trainer", "engine"
LIMIT_PERCENT = 3.0
_WARM_UP = 2  # turns
_BATCHES = 4


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        trained: what is trained.
        turns: of each loop.
        steps: of a turn, that are timed.
    """

    trained: Trained
    turns: int
    steps: int


class Turns:
    """The trainer's data source, which lets the other loops have their turns between two of the trainer's batches.

    Attributes:
        seconds: of each timed turn, by loop.
    """

    def __init__(self, case: Case, loops: dict[str, Loop], batches: list[list[Batch]], device: torch.device) -> None:
        self._case, self._loops, self._batches, self._device = case, loops, batches, device
        self.wait_seconds = 0.0
        self.bad_samples = BadSamples()
        self.seconds: dict[str, list[float]] = {name: [] for name in (TRAINER, *loops)}
        self._given = 0

    @property
    def total_steps(self) -> int:
        """Of the trainer; the last is there so that the one before it ends, whatever a trainer does at the end."""
        return (_WARM_UP + self._case.turns) * (1 + self._case.steps) + 1

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The trainer's batches."""
        names = list(self.seconds)
        for turn in range(_WARM_UP + self._case.turns):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                if name == TRAINER:
                    yield self._next()
                    began = self._now()
                    for _ in range(self._case.steps):
                        yield self._next()
                else:
                    began = self._run(self._loops[name])
                self.seconds[name].append(self._now() - began)
        yield self._next()

    def position(self) -> dict[str, Any]:
        """Nothing: there is no order to go on in."""
        return {}

    def describe(self, sample_id: int) -> str:
        """Names a sample that was made up."""
        return f"sample {sample_id}"

    def _run(self, loop: Loop) -> float:
        loop.step(self._next())
        began = self._now()
        for _ in range(self._case.steps):
            loop.step(self._next())
        return began

    def _next(self) -> list[Batch]:
        self._given += 1
        return self._batches[self._given % len(self._batches)]

    def _now(self) -> float:
        """The time when all ranks are here and their devices are done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        distributed.barrier()
        return time.perf_counter()


def measure(case: Case) -> dict[str, Any]:
    """The row of a case; every rank of an initialised group calls it."""
    device = prepare_environment()
    engine = build_of(case.trained, device)
    loops = _loops(case.trained, engine, device)
    turns = Turns(case, loops, case.trained.batches(engine.stage, _BATCHES), device)
    with tempfile.TemporaryDirectory(prefix="reid_dist-step-") as folder, _silence():
        _train(case.trained, engine, turns, device, Path(folder))
    engine.close()
    remove_own_shared_memory()
    if distributed.world_size() > 1:
        dist.barrier()
    return _row(case, device, turns.seconds)


def _loops(trained: Trained, engine: Engine, device: torch.device) -> dict[str, Loop]:
    found: dict[str, Loop] = {ENGINE: EngineLoop(engine, device)}
    if trained.stage.engine.precision != "pure_bf16":  # torch alone has no masters
        found["plain"] = TorchLoop(trained, device, parallel=False)
        found["ddp"] = TorchLoop(trained, device, parallel=True)
    return found


def _train(trained: Trained, engine: Engine, turns: Turns, device: torch.device, folder: Path) -> None:
    """Our trainer, as `stage_training.py` calls it."""
    config, stage = trained.config, trained.stage
    batch = stage.data.global_batch_size
    log = StageLog(stage.name, folder, turns.total_steps, batch, config.log_every)
    guard = Guard(config.guard, engine, turns.describe)
    state = TrainingState(engine, turns, log, guard, device, {}, batch)
    watching = config.supervision
    # The request hears no signal: one ends the measurement.
    with Watchdog(watching.hang_s, folder) as watchdog:
        stop = StopAgreement(StopRequest(watching.grace_s))
        # Saving is another benchmark: here a checkpoint is never due.
        writer = CheckpointWriter(folder / "checkpoints", config.checkpoint.keep, False, asynchronous=True)
        companions = Companions(watchdog, stop, watching.desync_every, None, writer, save_every=0)
        train(state, stage.optimizer, turns.total_steps, companions)
        stop.close()
    log.close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Lines of the log are made and written, but nobody reads them."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _row(case: Case, device: torch.device, seconds: dict[str, list[float]]) -> dict[str, Any]:
    times = {name: values[_WARM_UP:] for name, values in seconds.items()}
    stage = case.trained.stage
    row: dict[str, Any] = {
        "stage": stage.name,
        "ranks": case.trained.ranks,
        "rows": case.trained.rows,
        "backend": stage.engine.backend,
        "zero_stage": stage.engine.zero_stage,
        "precision": stage.engine.precision,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "ms": {name: round(1e3 * statistics.median(values) / case.steps, 3) for name, values in times.items()},
        "turns": {name: [round(1e3 * value / case.steps, 4) for value in values] for name, values in times.items()},
        "own_percent": share(times[TRAINER], times[ENGINE]),
    }
    for other in ("plain", "ddp"):
        if other in times:
            row[f"engine_over_{other}_percent"] = share(times[ENGINE], times[other])
    return row


def share(mine: list[float], other: list[float]) -> dict[str, float]:
    """What is added to `other`, in per cent of it: median over turns, and the quartiles."""
    percents = [100 * (x / y - 1) for x, y in zip(mine, other, strict=True)]
    low, middle, high = statistics.quantiles(percents, n=4) if len(percents) > 1 else percents * 3
    return {"median": round(middle, 2), "low": round(low, 2), "high": round(high, 2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py step`."""
    add_trained_arguments(parser)
    parser.add_argument("--stage", nargs="+", default=["pretrain"], help="of the recipe (default: pretrain)")
    parser.add_argument("--turns", type=int, default=15, help="of each loop (default: 15)")
    parser.add_argument("--steps", type=int, default=10, help="of a turn (default: 10)")


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """What is measured.

    Raises:
        UserError: options out of range, or a stage that cannot be measured.
    """
    require_positive(options, "turns", "steps", "ranks")
    config = load_config(options.config, options.set)
    trained = [Trained(config, name, ranks) for name in options.stage for ranks in dict.fromkeys(options.ranks)]
    for one in trained:
        one.check()
    return [Case(one, options.turns, options.steps) for one in trained]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "ms of a step, and per cent over it (median, quartiles over turns):",
        f"  {'stage':<12}{'ranks':>5}{'rows':>6}{'trainer':>9}{'engine':>9}{'ddp':>9}{'plain':>9}"
        f"{'own %':>22}{'engine over ddp %':>24}{'over plain %':>24}",
    ]
    for row in rows:
        times = "".join(f"{row['ms'].get(name, float('nan')):>9.2f}" for name in (TRAINER, ENGINE, "ddp", "plain"))
        shares = (row["own_percent"], row.get("engine_over_ddp_percent"), row.get("engine_over_plain_percent"))
        lines.append(
            f"  {row['stage']:<12}{row['ranks']:>5}{row['rows']:>6}{times}{_shown(shares[0]):>22}"
            + "".join(f"{_shown(x):>24}" for x in shares[1:])
        )
    worst = max(row["own_percent"]["median"] for row in rows)
    lines.append(f"  our own share: at most {worst:.2f} %, wanted at most {LIMIT_PERCENT:g} %")
    return "\n".join(lines)


def _shown(share: dict[str, float] | None) -> str:
    return "-" if share is None else f"{share['median']:+.2f} ({share['low']:+.2f} {share['high']:+.2f})"


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        UserError: wrong options, or a file that cannot be written.
    """
    cases = choose_cases(options)
    check_writable("--json", options.json)
    machine = describe_machine()  # its load before ours
    cores = len(os.sched_getaffinity(0))
    found = [
        measure_on_ranks("step", case.trained.ranks, max(1, cores // case.trained.ranks), measure, case)
        for case in tqdm(cases, desc="benchmark: steps", disable=None)
    ]
    settings = {"config": str(options.config), "set": options.set, "turns": options.turns, "steps": options.steps}
    write_results(options.json, {"rows": found, "settings": settings, "machine": machine})
    print(f"{table(found)}\nwritten: {options.json}")
