"""The implementations that `benchmark.py kernel` compares: ours, plain torch, other projects' and the bare products.

Each builds a function of no arguments that returns the mean loss of a cell's inputs, with a graph to their leaves.
Other projects' packages are used where they are installed; no one is asked to install them. What a peer cannot do:

- mask: leave out keys of the anchor's own identity. It gets the problem without a mask, and its errors are taken
  against the float64 answer to that.
- temperature gradient: only by scaling the anchors before the call, which rounds them once more in bfloat16.
- queue: take keys that are no gradient's business; it computes gradients for all of them.
- CPU: train on one.

Shape suffixes: B anchors, K keys, D features.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.benchmarks.kernel_plain import (
    Build,
    Step,
    checkpointed,
    compiled,
    naive,
    naive_pairs,
    roof,
)
from reid_dist.benchmarks.kernel_problem import DTYPES, Cell, Inputs, Problem
from reid_dist.kernels.contrastive import Backend, Mask, clip_contrastive, moco_nce

OURS: tuple[Backend, ...] = ("chunked", "triton", "reference")
ROOF = {"moco_nce": "two_gemms", "clip_contrastive": "three_gemms"}
_ONLY_SCALED = ("mask", "temperature gradient")


@dataclass(frozen=True)
class Contestant:
    """One way to compute a cell.

    Attributes:
        name: the row's `backend`.
        problem: what it is asked for (see `kernel_problem.Problem`).
        build: makes the function that is timed.
        cannot: what it cannot do; None for ours and for the roof.
        package: import name and name on the package index; None for what is here anyway.
        cuda_only: why it does not run on a CPU; None where it does.
        compiles: the first call compiles, so memory is taken from a later one (it keeps no workspace between calls).
        logit_bytes: memory for each logit, to refuse in time what would not fit; 0 where there is no B x K tensor.
    """

    name: str
    problem: Problem
    build: Build
    cannot: tuple[str, ...] | None
    package: tuple[str, str] | None = None
    cuda_only: str | None = None
    compiles: bool = False
    logit_bytes: int = 0

    @property
    def key(self) -> str:
        """Unique among a cell's contestants."""
        return f"{self.name}/{self.problem}"

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, as far as that is known without trying; None when it may."""
        if device.type != "cuda" and self.cuda_only:
            return self.cuda_only
        if self.package and importlib.util.find_spec(self.package[0]) is None:
            return f"not installed: pip install {self.package[1]}"
        return None


def contestants(cell: Cell) -> list[Contestant]:
    """All for a cell, the roof first and ours next."""
    return list(_queue_contestants(cell) if cell.op == "moco_nce" else _pair_contestants(cell))


def _queue_contestants(cell: Cell) -> Iterator[Contestant]:
    problems: tuple[tuple[Problem, Mask], ...] = (("identity", "identity"), ("none", "none"))
    yield Contestant("two_gemms", "none", roof, None, logit_bytes=cell.element)
    for problem, mask in problems:
        for backend in OURS:
            # Unmasked is the other projects' problem; of ours the plain form has nothing to show there.
            if mask == "identity" or backend != "reference":
                yield _our_queue(backend, problem, mask)
    yield from _plain_torch(cell, "identity", naive, logit_bytes=21)
    yield Contestant("checkpointed", "identity", checkpointed, ())
    flex_reason = "FlexAttention has no backward on the CPU"
    yield Contestant(
        "flex_attention", "identity", _flex, ("temperature gradient",), cuda_only=flex_reason, compiles=True
    )
    yield from _language_model_losses()
    yield Contestant(
        "inf_cl", "target", _inf_cl, (*_ONLY_SCALED, "queue", "CPU"), ("inf_cl", "inf-cl"), "has Triton kernels only"
    )


def _plain_torch(
    cell: Cell, problem: Problem, form: Callable[[torch.dtype], Build], logit_bytes: int
) -> Iterator[Contestant]:
    """With logits of either precision, and the one of the cell's compiled."""
    yield Contestant("naive", problem, form(torch.float32), (), logit_bytes=logit_bytes)
    yield Contestant("naive_bf16_logits", problem, form(torch.bfloat16), (), logit_bytes=logit_bytes)
    compiled_form = compiled(form(DTYPES[cell.dtype]))
    yield Contestant("naive_compiled", problem, compiled_form, (), compiles=True, logit_bytes=logit_bytes)


def _our_queue(backend: Backend, problem: Problem, mask: Mask) -> Contestant:
    def build(inputs: Inputs) -> Step:
        def step() -> Tensor:
            ids = (inputs.anchor_ids_B, inputs.key_ids_K)
            features = (inputs.anchors_BD, inputs.positives_BD, inputs.keys_KD)
            return moco_nce(*features, *ids, inputs.log_scale, mask=mask, backend=backend).mean()

        return step

    return Contestant(backend, problem, build, None, **_our_limits(backend))


def _our_limits(backend: Backend) -> dict[str, Any]:
    limits: dict[str, dict[str, Any]] = {
        "reference": {"logit_bytes": 32},
        "triton": {"cuda_only": "needs a CUDA device"},
    }
    return limits.get(backend, {})


def _language_model_losses() -> Iterator[Contestant]:
    """Linear layer and cross-entropy in one, the keys as frozen weights: cross-entropy over the queue."""
    cce = ("cut_cross_entropy", "cut-cross-entropy")
    yield Contestant("cce", "target", _cce, (*_ONLY_SCALED, "CPU"), cce, "its kernel is Triton")
    yield Contestant("cce_exact", "target", _cce_exact, (*_ONLY_SCALED, "CPU"), cce, "its kernel is Triton")
    yield Contestant(
        "cce_torch_compile", "target", _cce_torch_compile, _ONLY_SCALED, cce, compiles=True, logit_bytes=21
    )
    cannot = (*_ONLY_SCALED, "CPU")
    yield Contestant("liger", "target", _liger, cannot, ("liger_kernel", "liger-kernel"), "its kernel is Triton")
    yield Contestant("quack", "target", _quack, cannot, ("quack", "quack-kernels"), "its kernels are CuTe DSL")


def _pair_contestants(cell: Cell) -> Iterator[Contestant]:
    yield Contestant("three_gemms", "pairs", roof, None, logit_bytes=cell.element)
    for backend in OURS:
        yield _our_pairs(backend)
    yield from _plain_torch(cell, "pairs", naive_pairs, logit_bytes=24)
    yield Contestant(
        "open_clip", "pairs", _open_clip, ("mask", "queue"), ("open_clip", "open_clip_torch"), logit_bytes=32
    )
    yield Contestant(
        "inf_cl", "pairs", _inf_cl_pairs, ("mask", "queue", "CPU"), ("inf_cl", "inf-cl"), "has Triton kernels only"
    )


def _our_pairs(backend: Backend) -> Contestant:
    def build(inputs: Inputs) -> Step:
        def step() -> Tensor:
            return clip_contrastive(inputs.anchors_BD, inputs.keys_KD, inputs.log_scale, backend=backend).mean()

        return step

    return Contestant(backend, "pairs", build, None, **_our_limits(backend))


# Other projects


def _flex(inputs: Inputs) -> Step:
    """FlexAttention with the queue as keys and values: its log-sum-exp, with the mask as a score_mod."""
    attention: Any = importlib.import_module("torch.nn.attention.flex_attention")
    attend: Any = torch.compile(attention.flex_attention, dynamic=False)
    anchor_ids_B, key_ids_K = inputs.anchor_ids_B, inputs.key_ids_K
    keys_11KD = inputs.keys_KD[None, None]

    def leave_out(score: Tensor, _batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return torch.where(anchor_ids_B[row] == key_ids_K[column], -torch.inf, score)

    def step() -> Tensor:
        scaled_BD = _scaled(inputs)
        _, aux = attend(
            scaled_BD[None, None],
            keys_11KD,
            keys_11KD,
            score_mod=leave_out,
            scale=1.0,
            return_aux=attention.AuxRequest(lse=True),
        )
        positive_B = (scaled_BD.float() * inputs.positives_BD.float()).sum(dim=1)
        return F.softplus(aux.lse[0, 0] - positive_B).mean()

    return step


def _scaled(inputs: Inputs) -> Tensor:
    """The anchors times the inverse temperature, in their own dtype: how a loss without temperature gets one."""
    return (inputs.anchors_BD * inputs.log_scale.exp()).to(inputs.anchors_BD.dtype)


def _cce(inputs: Inputs) -> Step:
    return _linear_cross_entropy(inputs, impl="cce")


def _cce_exact(inputs: Inputs) -> Step:
    """Without the filter that drops small gradients; newer releases have a name for it."""
    package: Any = importlib.import_module("cut_cross_entropy")
    names = {name.lower() for name in package.LinearCrossEntropyImpl.__members__}
    return _linear_cross_entropy(inputs, **({"impl": "cce_exact"} if "cce_exact" in names else {"filter_eps": None}))


def _cce_torch_compile(inputs: Inputs) -> Step:
    return _linear_cross_entropy(inputs, impl="torch_compile")


def _linear_cross_entropy(inputs: Inputs, **options: Any) -> Step:
    package: Any = importlib.import_module("cut_cross_entropy")
    function = package.linear_cross_entropy
    return lambda: function(_scaled(inputs), inputs.keys_KD, inputs.targets_B, **options)


def _liger(inputs: Inputs) -> Step:
    package: Any = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    module = package.LigerFusedLinearCrossEntropyLoss()
    return lambda: module(inputs.keys_KD, _scaled(inputs), inputs.targets_B)


def _quack(inputs: Inputs) -> Step:
    package: Any = importlib.import_module("quack.linear_cross_entropy")
    function = package.chunked_linear_cross_entropy
    return lambda: function(_scaled(inputs), inputs.keys_KD, inputs.targets_B)


def _inf_cl(inputs: Inputs) -> Step:
    one_way = _inf_cl_loss(inputs)
    return lambda: one_way(inputs.anchors_BD, inputs.keys_KD)


def _inf_cl_pairs(inputs: Inputs) -> Step:
    one_way = _inf_cl_loss(inputs)
    return lambda: (one_way(inputs.anchors_BD, inputs.keys_KD) + one_way(inputs.keys_KD, inputs.anchors_BD)) / 2


def _inf_cl_loss(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    flash: Any = importlib.import_module("inf_cl.flash")
    head = math.gcd(inputs.cell.d, 256)

    def one_way(rows_BD: Tensor, columns_KD: Tensor) -> Tensor:
        scale = inputs.log_scale.exp()
        loss: Tensor = flash.cal_flash_loss(rows_BD, columns_KD, inputs.targets_B, scale, head).mean()
        return loss

    return one_way


def _open_clip(inputs: Inputs) -> Step:
    package: Any = importlib.import_module("open_clip.loss")
    module = package.ClipLoss()
    return lambda: module(inputs.anchors_BD, inputs.keys_KD, inputs.log_scale.exp())
