"""What a run says of itself: TensorBoard, a progress bar on a terminal, plain lines elsewhere."""

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from reid_dist.distributed import mean_over_ranks, rank, world_size
from reid_dist.slow_ranks import OwnWork


def say(text: str) -> None:
    """Prints a line on rank 0, above the progress bar if there is one."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class StageLog:
    """Means over ranks and steps of one stage, written every `log_every` steps.

    Args:
        name: of the stage, the first part of every TensorBoard tag.
        folder: where TensorBoard's events go (rank 0).
        total_steps: optimizer steps of the stage.
        global_batch_size: samples of a step.
        log_every: steps between points.
        own_work: of this rank; what it finds is said with the points. None: nothing is measured.

    Attributes:
        own_work: see above.
        history: the points.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        total_steps: int,
        global_batch_size: int,
        log_every: int,
        own_work: OwnWork | None = None,
    ) -> None:
        self.name = name
        self.total_steps = total_steps
        self.global_batch_size = global_batch_size
        self.log_every = log_every
        terminal = sys.stderr.isatty()
        self._writer = SummaryWriter(str(folder)) if rank() == 0 else None
        self._bar = tqdm(total=total_steps, desc=name, unit="step", disable=rank() != 0 or not terminal)
        self._plain = not terminal
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since = time.perf_counter()
        self._waited = 0.0
        self.own_work = OwnWork(torch.device("cpu"), 0.0) if own_work is None else own_work
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """What this rank knows, for a checkpoint: JSON-able, numbers bit by bit."""
        sums = {key: [float(value).hex(), self._counts[key]] for key, value in self._sums.items()}
        return {
            "sums": sums,
            "history": [{key: _text(value) for key, value in point.items()} for point in self.history],
            "elapsed": time.perf_counter() - self._since,
        }

    def load(self, state: dict[str, Any], step: int, device: torch.device) -> None:
        """Goes on from what `state` gave, after so many steps."""
        self.history = [
            {key: float(value) if isinstance(value, str) else value for key, value in point.items()}
            for point in state["history"]
        ]
        self._sums = {
            key: torch.tensor(float.fromhex(value), dtype=torch.float64, device=device)
            for key, (value, _) in state["sums"].items()
        }
        self._counts = {key: count for key, (_, count) in state["sums"].items()}
        self._since = time.perf_counter() - state["elapsed"]
        self._bar.update(step - self._bar.n)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds the values of one micro-batch, without waiting for the device; all ranks add the same names."""
        for key, value in metrics.items():
            value = value.detach().double().mean()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1

    def step_done(
        self,
        step: int,
        learning_rate: float,
        gradient_norm: Callable[[], float],
        wait_seconds: float,
        bad_samples: int = 0,
        skipped_steps: int = 0,
    ) -> None:
        """Counts an optimizer step (0-based); all ranks enter, because means over ranks are a collective.

        `wait_seconds` and `bad_samples` are this rank's since the stage began, `skipped_steps` those of all ranks.
        """
        self._bar.update()
        done = step + 1
        if done % self.log_every and done != self.total_steps:
            return
        if not self._sums:
            say(f"{self.name} {done}/{self.total_steps}: every step since the last line was skipped")
            self._since, self._waited = time.perf_counter(), wait_seconds
            return
        keys = sorted(self._sums)
        sums = torch.stack([self._sums[key] / self._counts[key] for key in keys])
        own_work = self.own_work.report().to(sums)
        found = mean_over_ranks(torch.cat([sums, sums.new_tensor([bad_samples]), own_work])).tolist()
        means, bad, worked = found[: len(keys)], found[len(keys)], found[len(keys) + 1 :]
        values = dict(zip(keys, means, strict=True))
        elapsed = time.perf_counter() - self._since
        steps = (step % self.log_every) + 1
        values |= {
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm(),
            "samples_per_s": steps * self.global_batch_size / elapsed,
            "data_wait_percent": 100 * (wait_seconds - self._waited) / elapsed,
            "bad_samples": round(bad * world_size()),
            "skipped_steps": skipped_steps,
            "memory_gib": _memory_gib(),
        }
        self._sums, self._counts = {}, {}
        self._since, self._waited = time.perf_counter(), wait_seconds
        self._write(done, values)
        if slow := self.own_work.slow(worked):
            say(f"{self.name} {done}/{self.total_steps}: {slow}")

    def _write(self, done: int, values: dict[str, float]) -> None:
        self.history.append({"step": done, **values})
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(f"{self.name}/{key}", value, done)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if self._plain:
            bad = f", {values['bad_samples']:.0f} bad samples replaced" if values["bad_samples"] else ""
            bad += f", {values['skipped_steps']} steps skipped" if values["skipped_steps"] else ""
            say(
                f"{self.name} {done}/{self.total_steps}: loss {values['loss']:.4f}, lr {values['learning_rate']:.2e},"
                f" {values['samples_per_s']:.0f} samples/s, waited for data {values['data_wait_percent']:.1f} %{bad}"
            )

    def close(self) -> None:
        """Ends the bar and flushes the events."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _text(value: float) -> float | str:
    """A number as JSON has it, bit by bit; nan and inf, which it has not, as words."""
    return value if math.isfinite(value) else str(value)


def write_scalars(folder: Path, step: int, values: dict[str, float]) -> None:
    """Adds a few scalars (an evaluation) to TensorBoard on rank 0."""
    if rank() == 0:
        with SummaryWriter(str(folder)) as writer:
            for key, value in values.items():
                writer.add_scalar(key, value, step)


def _memory_gib() -> float:
    """Peak memory of this rank: the GPU's where there is one, else the process's."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # not so with DS_ACCELERATOR=cpu on a machine with GPUs
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
