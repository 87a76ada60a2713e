"""A small state as the ranks of a run hold it: cut anywhere, in every k-th row, whole, in several dtypes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reid_dist.checkpoint.private import BUFFER, Private
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.distributed import rank, world_size
from reid_dist.pieces import Piece, shared_out

QUEUE_ROWS = 37


def tensors(step: int, size: int = 1) -> dict[tuple[str, str], Tensor]:
    """Whole tensors after a step, by part and name; `size` stretches the largest."""
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        ("weights", "encoder.conv.weight"): normal(5, 7, 11 * size),
        ("weights", "encoder.logit_scale"): normal(),
        ("exp_avg", "encoder.conv.weight"): normal(5, 7, 11 * size),
        ("step", "encoder.conv.weight"): torch.tensor(step),
        ("queue", "image"): normal(QUEUE_ROWS, 6).bfloat16(),
        ("queue", "ids"): torch.randint(100, (QUEUE_ROWS,), generator=generator, dtype=torch.int32),
    }


def pieces(step: int, size: int = 1) -> Iterator[Piece]:
    """This rank's share."""
    for (part, name), whole in tensors(step, size).items():
        if part == "queue":
            own = whole[rank() :: world_size()]
            yield Piece(part, name, own, QUEUE_ROWS, rank(), world_size(), tuple(whole.shape))
        else:
            yield from shared_out(part, name, whole)


def private(step: int) -> Private:
    """What this rank has of its own."""
    mean = torch.full((3,), step + rank() / 10)
    return Private({"rng": torch.arange(step, step + 9, dtype=torch.uint8), f"{BUFFER}mean": mean}, {"position": step})


def record(step: int, loss: float | None = None) -> dict[str, Any]:
    """What the training says of itself."""
    return {
        "stage": "pretrain",
        "kind": "pretrain",
        "steps": 100,
        "fingerprint": "0123456789abcdef",
        "samples": 16 * step,
        "trainable": ["encoder.conv.weight", "encoder.logit_scale"],
        "frozen": [],
        "groups": [{"names": ["encoder.conv.weight"], "lr": 1e-4, "base_lr": 1e-3, "weight_decay": 0.1}],
        "loss": float(100 - step) if loss is None else loss,
        "model": {"architecture": "RN50"},
        "words": None,
    }


def writer(folder: Path, keep: int = 2, best: bool = False, asynchronous: bool = True) -> CheckpointWriter:
    """A writer with the settings of most tests."""
    return CheckpointWriter(folder, keep, best, asynchronous)


def save(folder: Path, *steps: int, keep: int = 9, size: int = 1) -> None:
    """Saves the states of these steps; every rank calls it."""
    checkpoints = writer(folder, keep)
    for step in steps:
        checkpoints.save(step, pieces(step, size), private(step), record(step))
    checkpoints.finish()
