"""The problems that `benchmark.py kernel` gives to every implementation, and their float64 answers.

Shape suffixes: B anchors, K keys, D features.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.errors import UserError

OPS = ("moco_nce", "clip_contrastive")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPERATURE = 0.07

# identity: keys of the anchor's own identity are left out; none: all keys are negatives, the positive's copy in the
# queue too; target: cross-entropy over the queue whose target is that copy, which is all that the losses of language
# models can compute; pairs: symmetric cross-entropy of clip_contrastive.
Problem = Literal["identity", "none", "target", "pairs"]

_KEYS_OF_AN_IDENTITY = 4
_REFERENCE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Cell:
    """What is computed: one row of the table for each implementation.

    Attributes:
        op: one of `OPS`.
        b: anchors.
        k: keys; equal to b for clip_contrastive.
        d: features.
        dtype: of anchors and keys, a name of `DTYPES`.
    """

    op: str
    b: int
    k: int
    d: int
    dtype: str

    @property
    def size(self) -> str:
        """As the option `--sizes` takes it."""
        return f"{self.b}x{self.k}x{self.d}"

    @property
    def element(self) -> int:
        """Bytes of a feature."""
        return DTYPES[self.dtype].itemsize

    @property
    def input_bytes(self) -> int:
        """Bytes of anchors, positives, keys and ids."""
        return (2 * self.b + self.k) * (self.d * self.element + 4)

    @property
    def products(self) -> int:
        """Matrix products of 2BKD operations that no implementation can save: of a one-pass loss, or both sides'."""
        return 2 if self.op == "moco_nce" else 3

    def as_dict(self) -> dict[str, Any]:
        """For the rows and for a worker's command line."""
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a cell; the same on every process that asks for them on the same kind of device.

    For clip_contrastive the keys are the texts and train like the anchors, and row i's target is key i.

    Attributes:
        cell: what they are for.
        anchors_BD: unit length, leaf with gradient.
        keys_KD: unit length.
        targets_B: key that is the anchor's positive, int64.
        positives_BD: copies of those keys.
        anchor_ids_B: int32.
        key_ids_K: int32.
        log_scale: fp32, shape (), leaf with gradient.
    """

    cell: Cell
    anchors_BD: Tensor
    keys_KD: Tensor
    targets_B: Tensor
    positives_BD: Tensor
    anchor_ids_B: Tensor
    key_ids_K: Tensor
    log_scale: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient, the temperature last."""
        sides = [self.anchors_BD, self.keys_KD] if self.cell.op == "clip_contrastive" else [self.anchors_BD]
        return [*sides, self.log_scale]


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Random keys, some of each identity, and anchors at an angle of 45 degrees to one key each."""
    generator = torch.Generator(device).manual_seed(7)
    dtype = DTYPES[cell.dtype]

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, cell.d, generator=generator, device=device)

    keys_KD = F.normalize(normal(cell.k), dim=1).to(dtype)
    shuffled_K = torch.randperm(cell.k, generator=generator, device=device)
    key_ids_K = (shuffled_K // _KEYS_OF_AN_IDENTITY).to(torch.int32)
    if cell.op == "clip_contrastive":
        targets_B = torch.arange(cell.b, device=device)
    elif cell.b <= cell.k:
        targets_B = torch.randperm(cell.k, generator=generator, device=device)[: cell.b]
    else:
        targets_B = torch.randint(cell.k, (cell.b,), generator=generator, device=device)
    positives_BD = keys_KD[targets_B].clone()
    anchors_BD = F.normalize(positives_BD.float() + normal(cell.b) / math.sqrt(cell.d), dim=1).to(dtype)
    trains = cell.op == "clip_contrastive"
    return Inputs(
        cell,
        anchors_BD.requires_grad_(),
        keys_KD.requires_grad_(trains),
        targets_B,
        positives_BD,
        key_ids_K[targets_B],
        key_ids_K,
        torch.tensor(-math.log(TEMPERATURE), device=device, requires_grad=True),
    )


@dataclass(frozen=True)
class Answer:
    """A mean loss and its gradients: of anchors and, for clip_contrastive, keys, and of the temperature.

    Attributes:
        loss: the mean over anchors.
        gradients: in the order of `Inputs.leaves`; None where an implementation has none.
    """

    loss: Tensor
    gradients: list[Tensor | None]

    def errors(self, reference: "Answer") -> tuple[float, float | None, float | None]:
        """Relative errors in norm: of the loss, of the features' gradient, of the temperature's."""
        *sides, scale = self.gradients
        *true_sides, true_scale = reference.gradients
        return (
            _relative([self.loss], [reference.loss]),
            _relative(sides, true_sides),
            _relative([scale], [true_scale]),
        )


def _relative(found: Sequence[Tensor | None], true: Sequence[Tensor | None]) -> Any:
    pairs = [
        (x.double().cpu(), y.double().cpu())
        for x, y in zip(found, true, strict=True)
        if x is not None and y is not None
    ]
    if len(pairs) < len(found):
        return None
    distance = math.hypot(*(float((x - y).norm()) for x, y in pairs))
    return distance / (math.hypot(*(float(y.norm()) for _, y in pairs)) or 1.0)


def reference_answers(inputs: Inputs) -> dict[Problem, Answer]:
    """Each problem of the op by autograd in float64, in blocks of rows.

    An oracle of its own: it shares no line with `reid_dist.kernels`.
    """
    if inputs.cell.op == "clip_contrastive":
        return {"pairs": _pairs_answer(inputs)}
    keys_KD = inputs.keys_KD.detach().double()
    log_scale = inputs.log_scale.detach().double().requires_grad_()
    problems: tuple[Problem, ...] = ("identity", "none", "target")
    losses: dict[Problem, list[Tensor]] = {problem: [] for problem in problems}
    sides: dict[Problem, list[Tensor]] = {problem: [] for problem in problems}
    scales: dict[Problem, list[Tensor]] = {problem: [] for problem in problems}
    rows = max(1, _REFERENCE_BYTES // (8 * inputs.cell.k))
    for start in range(0, inputs.cell.b, rows):
        part = slice(start, start + rows)
        anchors_BD = inputs.anchors_BD.detach()[part].double().requires_grad_()
        for problem, loss_B in _row_losses(inputs, part, anchors_BD, keys_KD, log_scale):
            grad_BD, grad_scale = torch.autograd.grad(loss_B.sum(), (anchors_BD, log_scale), retain_graph=True)
            losses[problem].append(loss_B.detach().sum())
            sides[problem].append(grad_BD)
            scales[problem].append(grad_scale)
            del loss_B
    return {
        problem: Answer(
            torch.stack(losses[problem]).sum() / inputs.cell.b,
            [torch.cat(sides[problem]) / inputs.cell.b, torch.stack(scales[problem]).sum() / inputs.cell.b],
        )
        for problem in problems
    }


def _row_losses(inputs: Inputs, part: slice, anchors_BD: Tensor, keys_KD: Tensor, log_scale: Tensor) -> Any:
    """(problem, losses of these rows), one after the other: each costs a matrix of rows x K."""
    logits_BK = log_scale.exp() * (anchors_BD @ keys_KD.T)
    positive_B1 = log_scale.exp() * (anchors_BD * inputs.positives_BD[part].double()).sum(1, keepdim=True)
    first_B = torch.zeros(len(anchors_BD), dtype=torch.int64, device=logits_BK.device)
    same_BK = inputs.anchor_ids_B[part, None] == inputs.key_ids_K[None, :]
    masked_BK = logits_BK.masked_fill(same_BK, -torch.inf)
    yield "identity", F.cross_entropy(torch.cat([positive_B1, masked_BK], 1), first_B, reduction="none")
    del masked_BK, same_BK
    yield "none", F.cross_entropy(torch.cat([positive_B1, logits_BK], 1), first_B, reduction="none")
    yield "target", F.cross_entropy(logits_BK, inputs.targets_B[part], reduction="none")


def _pairs_answer(inputs: Inputs) -> Answer:
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    anchors_BD, keys_KD, log_scale = leaves
    logits_BB = log_scale.exp() * anchors_BD @ keys_KD.T
    loss = (F.cross_entropy(logits_BB, inputs.targets_B) + F.cross_entropy(logits_BB.T, inputs.targets_B)) / 2
    return Answer(loss.detach(), list(torch.autograd.grad(loss, leaves)))


def parse_size(text: str) -> tuple[int, int, int]:
    """B, K and D of a size such as 512x65536x512.

    Raises:
        UserError: it has another form or a number that is no count.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--sizes {text}: write anchors x keys x features, such as 512x65536x512")
    b, k, d = (int(number) for number in match.groups())
    return b, k, d
