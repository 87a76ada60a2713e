"""Plain torch forms of the contrastive losses, and the bare matrix products, for `benchmark.py kernel`.

Shape suffixes: B anchors, K keys, W keys at once, D features.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reid_dist.benchmarks.kernel_problem import DTYPES, Inputs

Step = Callable[[], Tensor | None]
Build = Callable[[Inputs], Step]

_CHECKPOINT_LOGITS = 2**23


# The roof


def roof(inputs: Inputs) -> Step:
    """The bare products in reused buffers, over as many keys at once as is fastest here."""
    widths = sorted({min(width, inputs.cell.k) for width in (inputs.cell.k, 16384, 4096, 1024)})
    logits = inputs.anchors_BD.new_empty(inputs.cell.b * max(widths), requires_grad=False)
    steps = [_products(inputs, width, logits) for width in widths]
    if len(steps) == 1:
        return steps[0]
    return min(steps, key=lambda step: _seconds(step, inputs.anchors_BD.device))


def _seconds(step: Step, device: torch.device) -> float:
    best = math.inf
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _products(inputs: Inputs, width: int, logits: Tensor) -> Step:
    """Logits and their product with the keys; for clip_contrastive with the anchors too."""
    anchors_BD, keys_KD = inputs.anchors_BD.detach(), inputs.keys_KD.detach()
    out_BD = torch.empty_like(anchors_BD)
    out_KD = torch.empty_like(keys_KD) if inputs.cell.op == "clip_contrastive" else None

    def step() -> None:
        for start in range(0, len(keys_KD), width):
            part_WD = keys_KD[start : start + width]
            logits_BW = logits[: len(anchors_BD) * len(part_WD)].view(len(anchors_BD), len(part_WD))
            torch.mm(anchors_BD, part_WD.T, out=logits_BW)
            if start == 0:
                torch.mm(logits_BW, part_WD, out=out_BD)
            else:
                out_BD.addmm_(logits_BW, part_WD)
            if out_KD is not None:
                torch.mm(logits_BW.T, anchors_BD, out=out_KD[start : start + width])

    return step


# Plain torch


def naive(dtype: torch.dtype) -> Build:
    """The published MoCo code with the mask: products in `dtype`, cross-entropy in float32 over all logits."""

    def build(inputs: Inputs) -> Step:
        first_B = _first(inputs)
        return lambda: F.cross_entropy(_naive_logits(inputs, inputs.anchors_BD.to(dtype), slice(None)), first_B)

    return build


def _naive_logits(inputs: Inputs, anchors_BD: Tensor, rows: slice) -> Tensor:
    """Shape: (B, 1 + K), the positive first. Scaled before the mask: after it the temperature's gradient is NaN."""
    dtype, scale = anchors_BD.dtype, inputs.log_scale.exp()
    positive_B1 = (anchors_BD * inputs.positives_BD[rows].to(dtype)).sum(dim=1, keepdim=True)
    negative_BK = anchors_BD @ inputs.keys_KD.to(dtype).T
    same_BK = inputs.anchor_ids_B[rows, None] == inputs.key_ids_K[None, :]
    masked_BK = (scale * negative_BK.float()).masked_fill(same_BK, -torch.inf)
    return torch.cat([scale * positive_B1.float(), masked_BK], dim=1)


def _first(inputs: Inputs) -> Tensor:
    return torch.zeros(inputs.cell.b, dtype=torch.int64, device=inputs.anchors_BD.device)


def compiled(build: Build) -> Build:
    """The same under torch.compile."""

    def build_compiled(inputs: Inputs) -> Step:
        step: Step = torch.compile(build(inputs), fullgraph=True, dynamic=False)
        return step

    return build_compiled


def checkpointed(inputs: Inputs) -> Step:
    """Blocks of anchors whose logits are computed again in the backward: what torch offers against the memory."""
    dtype = DTYPES[inputs.cell.dtype]
    rows = max(1, _CHECKPOINT_LOGITS // inputs.cell.k)
    first_B = _first(inputs)

    def block(anchors_BD: Tensor, start: int) -> Tensor:
        logits_BK = _naive_logits(inputs, anchors_BD, slice(start, start + rows))
        return F.cross_entropy(logits_BK, first_B[: len(anchors_BD)], reduction="sum")

    def step() -> Tensor:
        losses = [
            checkpoint(block, part_BD.to(dtype), number * rows, use_reentrant=False)
            for number, part_BD in enumerate(torch.split(inputs.anchors_BD, rows))
        ]
        return torch.stack(losses).sum() / inputs.cell.b

    return step


def naive_pairs(dtype: torch.dtype) -> Build:
    """Symmetric, products in `dtype`."""

    def build(inputs: Inputs) -> Step:
        def step() -> Tensor:
            logits_BB = (inputs.anchors_BD.to(dtype) @ inputs.keys_KD.to(dtype).T).float() * inputs.log_scale.exp()
            both = F.cross_entropy(logits_BB, inputs.targets_B) + F.cross_entropy(logits_BB.T, inputs.targets_B)
            return both / 2

        return step

    return build
