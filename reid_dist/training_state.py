"""All that a stage in training is made of beside its settings: what a checkpoint holds and a resumed run takes up."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reid_dist.checkpoint.digests import as_hex, pieces_digest
from reid_dist.checkpoint.private import BUFFER, Private
from reid_dist.checkpoint.reader import Checkpoint
from reid_dist.data.bad_samples import BadSamples
from reid_dist.distributed import rank
from reid_dist.engine import Engine
from reid_dist.engine.base import stored_buffers
from reid_dist.errors import UserError
from reid_dist.guard import Guard
from reid_dist.metrics import StageLog
from reid_dist.pieces import Piece
from reid_dist.stages import Batch


class Loader(Protocol):
    """What training needs of a data source."""

    wait_seconds: float
    bad_samples: BadSamples

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of this rank for each optimizer step."""

    def position(self) -> dict[str, Any]:
        """Where this rank stands after the last step that was given: JSON-able, batches read in advance left out."""

    def describe(self, sample_id: int) -> str:
        """Names a sample, for messages."""


@dataclass(frozen=True)
class TrainingState:
    """The parts of a stage in training that change from step to step.

    Ranks hold weights, moments, queue, key encoders and class centres together (`pieces`); random numbers, BatchNorm's
    statistics, the place in the data and counts are each rank's own (`private`).

    Attributes:
        about: fields of `checkpoint.manifest.Record` that do not change: stage, kind, steps, fingerprint, model, words.
        global_batch_size: samples of a step.
    """

    engine: Engine
    loader: Loader
    log: StageLog
    guard: Guard
    device: torch.device
    about: dict[str, Any]
    global_batch_size: int

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of what the ranks hold together."""
        yield from self.engine.pieces()
        yield from self.engine.stage.pieces()

    def private(self) -> Private:
        """What is this rank's own."""
        buffers = {BUFFER + name: buffer for name, buffer in stored_buffers(self.engine.stage).items()}
        return Private(
            tensors={**buffers, **_random_tensors(self.device)},
            values={
                "random": _random_values(),
                "loader": self.loader.position(),
                "log": self.log.state(),
                "guard": self.guard.state(),
                "counters": self.engine.stage.counters(),
            },
        )

    def record(self, step: int) -> dict[str, Any]:
        """What the manifest of a checkpoint says of the training after so many steps."""
        history = self.log.history
        return {
            **self.about,
            **_parameters(self.engine),
            "samples": step * self.global_batch_size,
            "loss": history[-1]["loss"] if history else None,
        }

    def _require_same(self, checkpoint: Checkpoint) -> None:
        """Refuses a checkpoint of other parameters, or of other settings of theirs."""
        saved, own = checkpoint.manifest, _parameters(self.engine)
        groups = [(sorted(group.names), group.base_lr, group.weight_decay) for group in saved.groups]
        ours = [(sorted(group["names"]), group["base_lr"], group["weight_decay"]) for group in own["groups"]]
        for what, theirs, mine in (
            ("trainable parameters", saved.trainable, own["trainable"]),
            ("frozen parameters", saved.frozen, own["frozen"]),
            ("parameter groups", sorted(groups), sorted(ours)),
        ):
            if theirs != mine:
                different = [str(x) for x in (*theirs, *mine) if (x in theirs) != (x in mine)]
                raise UserError(
                    f"{checkpoint.folder}: its {what} are not this stage's ({different[0]}); resume with the code and"
                    " settings that it was saved with, or choose another output_dir"
                )

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint, of any number of ranks; the loader was made at its place.

        With other ranks, those that a checkpoint knows go on with their own random numbers, the others draw new ones.

        Raises:
            UserError: it does not hold what this stage is made of.
        """
        self._require_same(checkpoint)
        own = checkpoint.private(rank() % checkpoint.manifest.world_size)
        assert own is not None  # every rank that saved has something of its own
        for name, buffer in stored_buffers(self.engine.stage).items():
            buffer.copy_(own.tensors[BUFFER + name])
        self.engine.restore(checkpoint)
        self.engine.stage.restore(checkpoint, own.values["counters"])
        self.log.load(own.values["log"], checkpoint.manifest.step, self.device)
        self.guard.load(own.values["guard"])
        _check_digests(pieces_digest(self.pieces()), checkpoint.manifest.digests)
        checkpoint.close()
        if rank() < checkpoint.manifest.world_size:
            _restore_random(own, self.device)
        else:
            torch.manual_seed(checkpoint.manifest.step * 1_000_003 + rank())


def _check_digests(found: dict[str, int], expected: dict[str, str]) -> None:
    """Compares a restored state with what was saved.

    Raises:
        RuntimeError: a part differs, or is missing: a fault of this program.
    """
    restored = {part: as_hex(value) for part, value in found.items()}
    different = sorted(part for part in {*restored, *expected} if restored.get(part) != expected.get(part))
    if different:
        raise RuntimeError(f"restored state differs from the checkpoint in {', '.join(different)}")


def _parameters(engine: Engine) -> dict[str, Any]:
    """What trains and how, and what does not."""
    named = dict(engine.stage.named_parameters())
    kept = ("names", "lr", "base_lr", "weight_decay")
    return {
        "trainable": sorted(name for name, p in named.items() if p.requires_grad),
        "frozen": sorted(name for name, p in named.items() if not p.requires_grad),
        "groups": [{key: group[key] for key in kept} for group in engine.groups],
    }


def _random_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators."""
    found = {"random/torch": torch.get_rng_state()}
    return found if device.type != "cuda" else {**found, "random/cuda": torch.cuda.get_rng_state(device)}


def _random_values() -> dict[str, Any]:
    """States of the other generators."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {"python": [version, list(words), gauss], "numpy": [kind, list(map(int, keys)), *rest]}


def _restore_random(own: Private, device: torch.device) -> None:
    torch.set_rng_state(own.tensors["random/torch"])
    if device.type == "cuda" and "random/cuda" in own.tensors:
        torch.cuda.set_rng_state(own.tensors["random/cuda"], device)
    version, words, gauss = own.values["random"]["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = own.values["random"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
