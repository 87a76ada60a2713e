"""What belongs to one rank alone: rank r of a resumed run takes up rank r's, modulo the ranks that saved."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BUFFER = (
    "buffer."  # what names of the stage's own buffers (BatchNorm's statistics) begin with; an export takes rank 0's
)


@dataclass(frozen=True)
class Private:
    """State of one rank: random generators, loader position, counters, BatchNorm's buffers.

    Attributes:
        tensors: by name; those of the stage's buffers begin with `BUFFER`. On any device.
        values: what has a JSON form; no nan or inf (keep floats as hex where bits count).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def as_json(values: dict[str, Any]) -> bytes:
    """The values as they are stored, equal for equal values.

    Raises:
        ValueError: a number is nan or infinite.
        TypeError: a value has no JSON form.
    """
    return json.dumps(values, sort_keys=True, allow_nan=False).encode()


def private_sha256(private: Private) -> str:
    """Hash of all that a rank has of its own, as hexadecimal digits."""
    digest = hashlib.sha256(as_json(private.values))
    for name, tensor in sorted(private.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
