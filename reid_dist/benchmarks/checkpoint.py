"""How long a checkpoint holds training up: `benchmark.py checkpoint --json OUT`.

The command starts the ranks itself, gloo processes on the CPU or one for each GPU where there are enough; they train a
small model with AdamW under ZeRO whose word table is as large as the state has to be. Ways to save take turns: ours,
waiting for the disk; ours beside training; and DeepSpeed's `save_checkpoint`, which neither flushes nor hashes.

stall: training stands still, in the call and, before the next optimizer, for what is copied beside the forward and
backward. total: from the call, alone, until the checkpoint is on the disk (DeepSpeed's: in the page cache). lost: by
how much a save delays the end of some steps that last longer than it, with all that it takes of the processor and the
disk meanwhile. Times are the slowest rank's, medians over turns after one turn of warm-up, which is told apart: it also
makes the memory that later ones use again.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reid_dist import distributed
from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.ranks import measure_on_ranks
from reid_dist.checkpoint.private import Private
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig, PretrainLoss
from reid_dist.engine import prepare_environment
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.errors import UserError
from reid_dist.files import write_results
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.supervision.leaving import remove_own_shared_memory

_WIDTH = 128  # of a word
_STATE_BYTES = 12  # of a parameter: fp32, and two moments
_ROWS = 8  # of a rank and step
_SIZE = (64, 32)
_LENGTH = 16  # of a caption
WAYS = ("synchronous", "asynchronous", "deepspeed")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        ranks: processes.
        zero_stage: of DeepSpeed.
        megabytes: of state, all ranks together.
        turns: of each way.
        folder: on the disk that is written to.
        threads: of each process.
    """

    ranks: int
    zero_stage: int
    megabytes: int
    turns: int
    folder: str
    threads: int


class _Training:
    """A model in training on one rank, and the ways to save it."""

    def __init__(self, case: Case) -> None:
        prepare_environment()
        torch.set_num_threads(case.threads)
        self.device = distributed.local_device()
        self._folder = Path(case.folder)
        stage = PretrainStage(build_dual_encoder(_model(case, self._folder)), PretrainLoss()).train()
        engine = EngineConfig.model_validate({"zero_stage": case.zero_stage, "precision": "fp32"})
        self._engine = DeepSpeedEngine(stage, engine, OptimizerConfig(), _ROWS)
        self._batch = _batch(stage.encoder.text_shape.vocab_size, self.device)
        self._writers = {way: CheckpointWriter(self._folder / way, 1, False, way == "asynchronous") for way in WAYS[:2]}
        self._saves = 0
        self._stalled = 0.0

    def state_bytes(self) -> int:
        """Of all ranks together; after the first step, which makes the moments."""
        own = sum(piece.rows_N.numel() * piece.rows_N.itemsize for piece in self._engine.pieces())
        return int(distributed.sum_over_ranks(torch.tensor(own, device=self.device)))

    def train(self, steps: int) -> None:
        """Some optimizer steps."""
        for _ in range(steps):
            self._engine.backward(self._engine(self._batch)["loss"])
            began = time.perf_counter()
            self._writers["asynchronous"].wait_for_copy()
            self._stalled += time.perf_counter() - began
            self._engine.step()

    def save(self, way: str) -> None:
        """Saves; returns when training may go on."""
        self._saves += 1
        self._synchronize()
        began = time.perf_counter()
        self._save(way)
        self._synchronize()
        self._stalled += time.perf_counter() - began

    def stalled(self) -> float:
        """Seconds that training has stood still on the slowest rank since this was asked last."""
        found, self._stalled = self._slowest([self._stalled]), 0.0
        return found[0]

    def _save(self, way: str) -> None:
        if way == "deepspeed":
            # Its own; no part of what an engine does for training.
            self._engine._engine.save_checkpoint(str(self._folder / way), tag="state")
        else:
            later = self._engine.pieces()
            self._writers[way].save(self._saves, (), Private(), self._record(), unchanging=later)

    def finish(self, way: str) -> None:
        """Waits until what was saved is on the disk."""
        if way != "deepspeed":
            self._writers[way].finish()

    def settle(self) -> None:
        """Writes out what DeepSpeed has left in the page cache, so that nobody else waits for it."""
        os.sync()
        distributed.barrier()

    def close(self) -> None:
        """Lets go of the engine."""
        self._engine.close()
        remove_own_shared_memory()

    def timed(self, *calls: Callable[[], None]) -> list[float]:
        """Seconds until each call has returned, of the slowest rank; all begin together."""
        distributed.barrier()
        self._synchronize()
        began, found = time.perf_counter(), []
        for call in calls:
            call()
            self._synchronize()
            found.append(time.perf_counter() - began)
        return self._slowest(found)

    def _slowest(self, seconds: list[float]) -> list[float]:
        slowest = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        if distributed.world_size() > 1:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return [float(each) for each in slowest]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _record(self) -> dict[str, Any]:
        kept = ("names", "lr", "base_lr", "weight_decay")
        return {
            **{"stage": "benchmark", "kind": "pretrain", "steps": 1, "fingerprint": "", "samples": 0, "model": {}},
            **{"trainable": [], "frozen": []},
            "groups": [{key: group[key] for key in kept} for group in self._engine.groups],
        }


def _model(case: Case, folder: Path) -> ModelConfig:
    words = case.megabytes * 1_000_000 // (_STATE_BYTES * _WIDTH)
    description = {
        "embed_dim": _WIDTH,
        "vision_cfg": {"row_conv": {"widths": [32, 64, 128], "groups": 8, "rows": 8}},
        "text_cfg": {"context_length": _LENGTH, "vocab_size": words, "width": _WIDTH, "heads": 4, "layers": 2},
    }
    path = folder / f"model-{distributed.rank()}.json"
    path.write_text(json.dumps(description))
    return ModelConfig(architecture=str(path), image_size=_SIZE)


def _batch(words: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(distributed.rank())
    token_BL = torch.randint(1, words - 1, (_ROWS, _LENGTH), generator=generator)
    token_BL[:, -1] = words - 1  # the end, where features are read
    image_BCHW = torch.randint(0, 256, (_ROWS, 3, *_SIZE), generator=generator, dtype=torch.uint8)
    batch = {"image_BCHW": image_BCHW, "token_BL": token_BL, "pid_B": torch.arange(_ROWS)}
    return {name: x.to(device) for name, x in batch.items()}


def measure(case: Case) -> dict[str, Any]:
    """The rows of a case; every rank of an initialised group calls it."""
    training = _Training(case)
    training.train(3)
    size = training.state_bytes()
    first, total = {}, {}
    for way in WAYS:
        training.stalled()
        ways = partial(training.save, way), partial(training.train, 1), partial(training.finish, way)
        total[way] = training.timed(*ways)[-1]
        first[way] = training.stalled()
        training.settle()
    step_s = statistics.median(training.timed(lambda: training.train(1))[0] for _ in range(5))
    steps = max(2, round(1.5 * total["synchronous"] / step_s))
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(case.turns):
        for way in WAYS:
            found[way].append(_turn(training, way, steps))
    rows = []
    for way in WAYS:
        stall, total, lost = (statistics.median(column) for column in zip(*found[way], strict=True))
        rows.append(
            {
                "way": way,
                "ranks": case.ranks,
                "zero_stage": case.zero_stage,
                "device": training.device.type,
                "state_mb": round(size / 1e6, 1),
                "stall_s": round(stall, 4),
                "total_s": round(total, 4),
                "lost_s": round(lost, 4),
                "first_stall_s": round(first[way], 4),
                "step_s": round(step_s, 4),
                "steps": steps,
            }
        )
    training.close()
    return {"rows": rows}


def _turn(training: _Training, way: str, steps: int) -> tuple[float, float, float]:
    """Stall and total of one save, and what another one takes of the steps beside it."""
    save, finish = partial(training.save, way), partial(training.finish, way)
    total = training.timed(save, finish)[-1]
    training.settle()
    alone = training.timed(lambda: training.train(steps))[0]
    training.stalled()
    saved = training.timed(save, lambda: training.train(steps), finish)[-1]
    stall = training.stalled()
    training.settle()
    return stall, total, saved - alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py checkpoint`."""
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1, help="of DeepSpeed (default: 1)")
    parser.add_argument("--megabytes", type=int, default=200, help="of state, all ranks together (default: 200)")
    parser.add_argument("--turns", type=int, default=5, help="of each way to save (default: 5)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to write to (default: here)")


def choose_case(options: argparse.Namespace, folder: str) -> Case:
    """What is measured.

    Raises:
        UserError: options out of range, or a disk without room.
    """
    for name in ("ranks", "megabytes", "turns"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be above 0")
    # Three ways, each with its last checkpoint and the next; every rank of DeepSpeed's ZeRO 0 has a file of weights.
    needed, free = 6.5e6 * options.megabytes, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"--folder {options.folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    return Case(options.ranks, options.zero_stage, options.megabytes, options.turns, folder, threads)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    whole = rows[0]["total_s"]
    first = rows[0]
    lines = [
        f"{first['state_mb']:,.0f} MB of state, {first['ranks']} ranks ({first['device']}), ZeRO {first['zero_stage']},"
        f" beside {first['steps']} steps of {first['step_s']:.3f} s:",
        f"  {'way':<14}{'stall s':>9}{'total s':>9}{'lost s':>9}{'first stall s':>15}{'stall of synchronous':>22}",
    ]
    for row in rows:
        lines.append(
            f"  {row['way']:<14}{row['stall_s']:>9.3f}{row['total_s']:>9.3f}{row['lost_s']:>9.3f}"
            f"{row['first_stall_s']:>15.3f}{row['stall_s'] / whole:>21.1%}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        UserError: wrong options or files that cannot be written.
    """
    check_writable("--json", options.json)
    if not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: no such folder")
    machine = describe_machine()  # its load before ours
    with tempfile.TemporaryDirectory(prefix="reid_dist-benchmark-", dir=options.folder) as folder:
        case = choose_case(options, folder)
        rows = measure_on_ranks("checkpoint", case.ranks, case.threads, measure, case)["rows"]
    settings = {name: value for name, value in asdict(case).items() if name != "folder"}
    write_results(options.json, {"rows": rows, "settings": settings, "machine": machine})
    print(f"{table(rows)}\nwritten: {options.json}")
