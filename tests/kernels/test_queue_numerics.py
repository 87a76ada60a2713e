"""Rounding of the queue losses against float64 on the same inputs, in relative norm, beside plain torch.

Gates: float32 loss 1e-6, gradient 1e-5; bfloat16 inputs 1e-5 and 2e-3; never worse than twice plain torch with float32
logits. They presuppose that float32 products can hold the result. `Limit` says what they can: a product of D terms is
known to sqrt(D) 2^-24 s |a| |k| (its typical rounding, kernel.md section 7), every lse as well, and where the loss is
exp(lse - positive), that error is its relative error. At temperature 0.01 and for unnormalised inputs it is above the
gate; there the limit is the gate, and twice plain torch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels.contrastive import EMPTY, moco_nce, supcon_queue

GATES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-5, 2e-3)}
CASES: dict[str, dict[str, Any]] = {
    "typical": {},
    "wide features": {"rows": 23, "keys": 1511, "features": 512},
    "temperature 0.01": {"temperature": 0.01},
    "temperature 0.02": {"temperature": 0.02},
    "easy": {"temperature": 0.02, "near": 0.9},
    "unnormalised": {"norm": 5.0},
    "tiny features": {"norm": 0.05},
    "one anchor": {"rows": 1},
    "one key": {"rows": 9, "keys": 1, "empty": 0.0, "random": 0.0, "people": 50},
    "one of each": {"rows": 1, "keys": 1, "empty": 0.0, "random": 0.0, "people": 50},
    "primes": {"rows": 31, "keys": 509, "features": 61},
    "half empty": {"empty": 0.5},
    "two people": {"people": 2},
}


def build(queue_case: Callable, name: str, dtype: torch.dtype) -> Any:
    """A case of CASES, or one of those that need a hand."""
    size = {"rows": 37, "keys": 2003, "features": 128, "people": 400, "seed": 5}
    case = queue_case(**{**size, **CASES.get(name, {}), "dtype": dtype})
    if name == "duplicated keys":
        return case._replace(keys_KD=case.keys_KD[:5].repeat(401, 1)[:2003].contiguous())
    if name == "some rows masked":
        # Every other anchor is the person that all keys show.
        anchor_ids = torch.arange(37, dtype=torch.int32) % 2
        return case._replace(anchor_ids_B=anchor_ids, key_ids_K=torch.zeros_like(case.key_ids_K))
    if name == "one unmasked key":
        key_ids = torch.full_like(case.key_ids_K, EMPTY)
        key_ids[1234] = 7
        return case._replace(key_ids_K=key_ids, anchor_ids_B=torch.zeros_like(case.anchor_ids_B))
    if name == "loss 1e-8":
        case = queue_case(37, 2003, 512, people=400, near=0.0, temperature=0.037, dtype=dtype)
        return case._replace(positives_BD=case.anchors_BD)
    return case


def by_hand(case: Any) -> Tensor:
    """The softplus form in the dtype of the case; in float64, the reference."""
    logits, positive, left_out = logits_of(case)
    gap = logits.masked_fill(left_out, -torch.inf).logsumexp(dim=1) - positive
    return F.softplus(gap.masked_fill(left_out.all(dim=1), -torch.inf), threshold=100.0)


def plain(case: Any) -> Tensor:
    """What everybody writes: cross-entropy of [positive, negatives], float32 logits."""
    wide = case._replace(**{name: getattr(case, name).float() for name in ("anchors_BD", "positives_BD", "keys_KD")})
    logits, positive, left_out = logits_of(wide)
    logits = torch.cat([positive[:, None], logits.masked_fill(left_out, -torch.inf)], dim=1)
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long), reduction="none")


def logits_of(case: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale = case.log_scale.exp()
    left_out = (case.key_ids_K == EMPTY)[None, :] | (case.anchor_ids_B[:, None] == case.key_ids_K[None, :])
    positive = scale * (case.anchors_BD * case.positives_BD).sum(dim=1)
    return scale * case.anchors_BD @ case.keys_KD.T, positive, left_out


def results(loss: Callable[[Any], Tensor], case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of anchors, gradient of log_scale) for a gradient from above that is not 1."""
    case = case.leaves()
    value = loss(case)
    weight = 3 * torch.rand(value.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return value.detach(), *torch.autograd.grad((value.double() * weight).sum(), (case.anchors_BD, case.log_scale))


class Limit(NamedTuple):
    """What float32 products can reach, as relative errors of the loss and of the anchors' gradient."""

    loss: float
    gradient: float


def limit_of(case: Any, reference: tuple[Tensor, ...]) -> Limit:
    case = case.double()
    logits, positive, left_out = logits_of(case)
    gap = logits.masked_fill(left_out, -torch.inf).logsumexp(dim=1) - positive
    anchor_norm = case.anchors_BD.norm(dim=1)
    largest = torch.cat([case.keys_KD, case.positives_BD]).norm(dim=1).max()
    scale = case.log_scale.exp()
    known_to = math.sqrt(case.keys_KD.shape[1]) * 2.0**-24 * scale * anchor_norm * largest
    loss = (gap.sigmoid() * known_to).norm() / reference[0].norm()
    # Every weight p is known to twice that, the sigmoid to once; they multiply vectors of at most the largest norm.
    gradient = (3 * gap.sigmoid() * known_to * scale * 3 * largest).norm() / reference[1].norm()
    return Limit(float(loss), float(gradient))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*CASES, "duplicated keys", "some rows masked", "one unmasked key", "loss 1e-8"])
def test_moco_is_as_exact_as_its_inputs_allow(
    queue_case: Callable, relative_error: Callable, name: str, dtype: torch.dtype, backend: str
) -> None:
    case = build(queue_case, name, dtype)
    reference = results(by_hand, case.double())
    found = results(lambda case: moco_nce(*case, backend=backend), case)
    others = results(plain, case)
    limit = limit_of(case, reference)
    loss_gate, gradient_gate = GATES[dtype]
    # A bfloat16 gradient cannot be nearer than the nearest bfloat16 numbers.
    rounded = relative_error(reference[1].to(dtype), reference[1])
    loss_error, gradient_error = (relative_error(x, y) for x, y in zip(found[:2], reference[:2], strict=True))
    assert loss_error <= max(loss_gate, limit.loss)
    assert gradient_error <= max(gradient_gate, limit.gradient, 1.01 * rounded)
    # Twice plain torch; below a few units in the last place luck decides.
    assert loss_error <= 2 * relative_error(others[0], reference[0]) + 3e-7
    assert gradient_error <= 2 * relative_error(others[1], reference[1]) + 1e-6


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*CASES, "duplicated keys", "some rows masked"])
def test_the_gradient_of_the_scale_is_exact(queue_case: Callable, name: str, dtype: torch.dtype, backend: str) -> None:
    """It sums terms of both signs, s a.O and s a.k+: its error is measured against their size, not their sum's."""
    case = build(queue_case, name, dtype)
    double = case.double()
    expected = results(by_hand, double)[2]
    logits, positive, left_out = logits_of(double)
    logits = logits.masked_fill(left_out, -torch.inf)
    attended = (logits.softmax(dim=1) * logits).nan_to_num().sum(dim=1)
    terms = (logits.logsumexp(dim=1) - positive).sigmoid() * (attended.abs() + positive.abs())
    found = results(lambda case: moco_nce(*case, backend=backend), case)[2]
    others = results(plain, case)[2]
    error = abs(float(found) - float(expected))
    assert error <= 1e-6 * float(terms.sum()) + 1e-30
    assert error <= 2 * abs(float(others) - float(expected)) + 3e-7 * float(terms.sum()) + 1e-30


def test_the_loss_of_an_easy_positive_is_the_one_named(queue_case: Callable) -> None:
    loss = results(by_hand, build(queue_case, "loss 1e-8", torch.float32).double())[0]
    assert 1e-9 < float(loss.mean()) < 1e-7


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_supcon_is_exact(
    queue_case: Callable, relative_error: Callable, dtype: torch.dtype, temperature: float, backend: str
) -> None:
    case = queue_case(37, 1009, 64, people=60, temperature=temperature, dtype=dtype)

    def plain_supcon(case: Any) -> Tensor:
        wide = (
            case
            if case.anchors_BD.dtype == torch.float64
            else case._replace(anchors_BD=case.anchors_BD.float(), keys_KD=case.keys_KD.float())
        )
        logits = wide.log_scale.exp() * wide.anchors_BD @ wide.keys_KD.T
        filled = (wide.key_ids_K != EMPTY)[None, :]
        positive = (wide.anchor_ids_B[:, None] == wide.key_ids_K[None, :]) & filled
        log_p = logits - logits.masked_fill(~filled, -torch.inf).logsumexp(dim=1, keepdim=True)
        return -(log_p * positive).sum(dim=1) / positive.sum(dim=1)

    reference = results(plain_supcon, case.double())
    found = results(lambda case: supcon_queue(*case.attend(), backend=backend), case)
    others = results(plain_supcon, case)
    for x, y, other, gate, floor in zip(
        found, reference, others, (*GATES[dtype], GATES[dtype][1]), (3e-7, 1e-6, 1e-6), strict=True
    ):
        assert relative_error(x, y) <= gate
        assert relative_error(x, y) <= 2 * relative_error(other, y) + floor
