"""Which optimizer steps are made: all ranks together skip one whose loss or gradient is not finite, or leaps.

A skipped step changes nothing: the engine lets go of the gradients, momentum encoder and queue stay (`Stage.after_step`
with updated=False), and here BatchNorm's running statistics go back to what they were before the forward, which a NaN
would have spoilt for good without any loss showing it.

Shape suffixes: B rows of a micro-batch.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from reid_dist.config import GuardConfig
from reid_dist.distributed import all_gather, all_gather_object, rank
from reid_dist.errors import NonFiniteError
from reid_dist.models.heads import BNNeck
from reid_dist.stages import Batch, Stage

_NAMED = 8  # samples in a line: what is wrong with hundreds is not the samples
_REMEMBERED = 64
T = TypeVar("T")


class Forward(Protocol):
    """What is needed of an engine."""

    stage: Stage

    def run(self, part: Callable[[Batch], T], batch: Batch) -> T:
        """`part(batch)` as a forward."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks do with a step.

    Attributes:
        skip: for `engine.step`.
        line: why, for rank 0 to say; empty where the step is made.
    """

    skip: bool
    line: str = ""


class Guard:
    """Decides over each optimizer step of a stage; one for each stage, on every rank.

    In a step of the trainer: `begin` before the first forward; `admit` after the last backward and before the
    `engine.step` that would make the step; then `engine.step(skip=verdict.skip)`, `say(verdict.line)` if there is one,
    and `stage.after_step` with what the engine returned. Losses of a skipped step belong in no mean: add them to the
    log after `admit`, and only if it was not skipped.

    With `spike_sigma` also losses and gradient norms are skipped that are more than so many standard deviations above
    the mean of the last `window` steps that were made, once half as many were (the rule of OLMo-core's
    SkipStepOptimizer, which counts the skipped ones too: a NaN then skips all that follow).

    Args:
        config: settings.
        engine: of the stage; looks for the samples whose features are not finite.
        name_of: a sample id of this rank's batches, as a person finds it: set, shard and key.

    Attributes:
        skipped: steps of the stage that were not made, for the metrics.
    """

    def __init__(self, config: GuardConfig, engine: Forward, name_of: Callable[[int], str]) -> None:
        self.skipped = 0
        self._config, self._engine, self._name_of = config, engine, name_of
        self._statistics = _Statistics(engine.stage)
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._in_a_row = 0
        self._blamed: list[str] = []

    def begin(self) -> None:
        """Before the first forward of a step: notes what a skipped step puts back."""
        self._statistics.keep()

    def admit(self, step: int, losses: Sequence[Tensor], norm: Tensor, batches: Iterable[Batch]) -> Verdict:
        """Decides, on all ranks alike. Collective: one gather of a few numbers, and the only wait for the device.

        Args:
            step: 0-based.
            losses: of this rank, as many on every one: one for each micro-batch or, with cached gradients, one.
            norm: `engine.pending_norm()`.
            batches: this rank's micro-batches on its device; looked at only where something is not finite, so a
                generator that moves them there costs nothing else.

        Raises:
            NonFiniteError: it would be the `max_skips`th skipped step in a row; on every rank.
        """
        table = self._gather(losses, norm)
        reason = _not_finite(table)
        if reason is not None:
            self._statistics.put_back()
            reason += self._blame(table, batches)
        else:
            loss, largest = _mean([x for row in table for x in row[:-2]]), max(row[-2] for row in table)
            reason = self._spike(loss, largest)
        if reason is not None:
            return self._skip(step, reason)
        self._losses.append(loss)
        self._norms.append(largest)
        self._in_a_row, self._blamed = 0, []
        return Verdict(False)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON, floats bit by bit; the same on every rank."""
        history = {"losses": [x.hex() for x in self._losses], "norms": [x.hex() for x in self._norms]}
        return {**history, "skipped": self.skipped, "in_a_row": self._in_a_row, "blamed": list(self._blamed)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave; of a longer window the newest."""
        self._losses.extend(float.fromhex(x) for x in state["losses"])
        self._norms.extend(float.fromhex(x) for x in state["norms"])
        self.skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self._blamed = list(state["blamed"])

    @torch.no_grad()
    def _gather(self, losses: Sequence[Tensor], norm: Tensor) -> list[list[float]]:
        """A row for each rank: its losses, the norm, and that of gradients which the engine does not see."""
        beside = [leaf.grad.norm() for leaf in self._engine.stage.leaves() if leaf.grad is not None]
        own = [*losses, norm, torch.stack(beside).norm() if beside else torch.zeros_like(norm)]
        row = torch.stack([x.detach().double().reshape(()) for x in own])
        table: list[list[float]] = all_gather(row[None]).tolist()
        return table

    def _blame(self, table: list[list[float]], batches: Iterable[Batch]) -> str:
        """The samples at fault, as well as they can be told: losses see the features of all ranks. Collective."""
        own, sure, seen = table[rank()][:-2], list[int](), list[list[int]]()
        for found, ids in _not_finite_samples(self._engine, batches):
            sure += found
            seen.append(ids)
        losses = own if len(own) == len(seen) else own * len(seen)  # one for all, with cached gradients
        unsure = [x for ids, loss in zip(seen, losses, strict=True) if not math.isfinite(loss) for x in ids]
        told = all_gather_object([([self._name_of(x) for x in ids[:_NAMED]], len(ids)) for ids in (sure, unsure)])
        for kind, what in enumerate(("features not finite", "losses not finite, though all features are")):
            named = [(name, owner) for owner, kinds in enumerate(told) for name in kinds[kind][0]]
            if named:
                self._blamed = list(dict.fromkeys([*self._blamed, *(name for name, _ in named)]))[:_REMEMBERED]
                count = sum(kinds[kind][1] for kinds in told)
                return f"; {what}: {_listed([f'{name} (rank {owner})' for name, owner in named], count)}"
        return "; features and losses of all samples are finite"

    def _spike(self, loss: float, norm: float) -> str | None:
        sigma, needed = self._config.spike_sigma, max(2, self._config.window // 2)
        if not sigma or len(self._losses) < needed:
            return None
        for what, value, history in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            mean = _mean(history)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in history) / (len(history) - 1))
            if value > mean + sigma * deviation:
                return (
                    f"the {what} {value:.4g} is more than {sigma:g} deviations of {deviation:.2g} above the mean"
                    f" {mean:.4g} of the last {len(history)} steps"
                )
        return None

    def _skip(self, step: int, reason: str) -> Verdict:
        self._statistics.put_back()
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self._config.max_skips:
            blamed = f"; samples: {_listed(self._blamed, len(self._blamed))}" if self._blamed else ""
            raise NonFiniteError(
                f"step {step + 1}: {self._in_a_row} steps in a row could not be made (guard.max_skips), this one"
                f" because {reason}{blamed}; exclude samples that are at fault (data.exclude), lower optimizer.lr or"
                " set engine.max_grad_norm, in another output_dir"
            )
        return Verdict(True, f"step {step + 1} skipped: {reason} ({self._in_a_row} in a row, {self.skipped} in all)")


class _Statistics:
    """The running statistics of a stage's normalisations, kept from one forward to the next."""

    def __init__(self, stage: Stage) -> None:
        layers = [layer for layer in stage.modules() if isinstance(layer, (_NormBase, BNNeck))]
        self._live = [buffer for layer in layers for buffer in layer.buffers()]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Notes them as they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes them what `keep` found."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


@torch.no_grad()
def _not_finite_samples(engine: Forward, batches: Iterable[Batch]) -> list[tuple[list[int], list[int]]]:
    """For each of this rank's batches, ids of the samples with features that are not finite, and of all.

    In evaluation mode: batch statistics would spread one row's NaN over all, and nothing random is drawn.
    """
    engine.stage.eval()
    part = partial(_not_finite_rows, engine.stage)
    try:  # one on the device at a time
        return [(engine.run(part, batch), batch["sample_id_B"].tolist()) for batch in batches]
    finally:
        engine.stage.train()


def _not_finite_rows(stage: Stage, batch: Batch) -> list[int]:
    id_B = batch["sample_id_B"]
    bad_B = torch.zeros_like(id_B, dtype=torch.bool)
    for feature in stage.features(batch, {}).values():
        if feature.dim() == 0:
            continue
        row_R = ~feature.flatten(1).isfinite().all(dim=1) if feature.dim() > 1 else ~feature.isfinite()
        if len(row_R) == len(id_B):
            bad_B |= row_R
        elif len(row_R) == len(batch.get("token_BL", ())):  # of a mix with uncaptioned samples
            bad_B[batch["captioned_B"]] |= row_R
    found: list[int] = id_B[bad_B].tolist()
    return found


def _not_finite(table: list[list[float]]) -> str | None:
    """What is not finite in a step, and on which ranks."""
    parts = {"loss": slice(-2), "gradient norm": slice(-2, -1), "gradient norm of the class centres": slice(-1, None)}
    for what, part in parts.items():
        found = {owner: x for owner, row in enumerate(table) for x in row[part] if not math.isfinite(x)}
        if len(found) == len(table):
            return f"the {what} is {found[0]} on every rank" if len(table) > 1 else f"the {what} is {found[0]}"
        if found:
            where = _listed([f"{x} on rank {owner}" for owner, x in found.items()], len(found))
            return f"the {what} is {where} of {len(table)}"
    return None


def _mean(values: Sequence[float] | deque[float]) -> float:
    return math.fsum(values) / len(values)


def _listed(names: Sequence[str], count: int) -> str:
    """The first of the names, and how many more there are; names hold commas."""
    shown = names[:_NAMED]
    return "; ".join([*shown, f"and {count - len(shown)} more"] if count > len(shown) else shown)
