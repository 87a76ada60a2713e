"""Rounding of the pair losses against float64 on the same inputs, in relative norm, beside plain torch.

Gates and limits as in test_queue_numerics.py: float32 loss 1e-6, gradient 1e-5; bfloat16 1e-5 and 2e-3; never worse
than twice plain torch with float32 logits, whose autograd runs through log_softmax, logsigmoid and cross-entropy.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels import operators
from reid_dist.kernels.contrastive import clip_contrastive, pair_attend, sdm, siglip

GATES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-5, 2e-3)}
CASES: dict[str, dict[str, Any]] = {
    "typical": {},
    "temperature 0.01": {"temperature": 0.01},
    "easy": {"temperature": 0.02, "near": 0.9},
    "unnormalised": {"norm": 3.0},
    "one row": {"rows": 1},
    "one column": {"keys": 1},
    "primes": {"rows": 31, "keys": 509, "features": 61},
    "one person": {"people": 1},
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def kernel(name: str, backend: str) -> Callable[..., Tensor]:
    def pairs(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        return torch.cat(pair_attend(a, c, s, backend=backend))

    def clip(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        rows = min(a.shape[0], c.shape[0])
        return clip_contrastive(a[:rows], c[:rows], s, backend=backend)

    def clip_ids(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        rows = min(a.shape[0], c.shape[0])
        return clip_contrastive(a[:rows], c[:rows], s, ia[:rows], backend=backend)

    def matching(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        return sdm(a, c, ia, ic, s, backend=backend)

    def sigmoid(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        return siglip(a, c, ia, ic, s, s - 12.0, backend=backend)

    return {"pairs": pairs, "clip": clip, "clip_ids": clip_ids, "sdm": matching, "siglip": sigmoid}[name]


def plain(name: str) -> Callable[..., Tensor]:
    """What everybody writes; in float64, the reference."""

    def logits(a: Tensor, c: Tensor, s: Tensor) -> Tensor:
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        return s.exp() * a.to(wide) @ c.to(wide).T

    def pairs(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        return torch.cat([logits(a, c, s).logsumexp(1), logits(a, c, s).logsumexp(0)])

    def soft(a: Tensor, c: Tensor, target: Tensor, s: Tensor) -> Tensor:
        x = logits(a, c, s)
        target = target.to(x.dtype) / target.sum(1, keepdim=True)
        return (F.cross_entropy(x, target, reduction="none") + F.cross_entropy(x.T, target, reduction="none")) / 2

    def clip(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        rows = min(a.shape[0], c.shape[0])
        return soft(a[:rows], c[:rows], torch.eye(rows), s)

    def clip_ids(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        rows = min(a.shape[0], c.shape[0])
        return soft(a[:rows], c[:rows], (ia[:rows, None] == ia[None, :rows]), s)

    def matching(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        x, same = logits(a, c, s), (ia[:, None] == ic[None, :])
        parts = []
        for y, positive in ((x, same), (x.T, same.T)):
            q = positive.to(y.dtype) / positive.sum(1, keepdim=True).clamp(min=1)
            parts.append((y.softmax(1) * (y.log_softmax(1) - (q + 1e-8).log())).sum(1).mean())
        return parts[0] + parts[1]

    def sigmoid(a: Tensor, c: Tensor, ia: Tensor, ic: Tensor, s: Tensor) -> Tensor:
        z = torch.where(ia[:, None] == ic[None, :], 1.0, -1.0)
        x = logits(a, c, s)
        return -F.logsigmoid(z.to(x.dtype) * (x + s - 12.0)).sum(1)

    return {"pairs": pairs, "clip": clip, "clip_ids": clip_ids, "sdm": matching, "siglip": sigmoid}[name]


def results(loss: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """[loss, gradients of rows and columns in one vector] for a gradient from above that is not 1."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = loss(*leaves)
    weight = 3 * torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.autograd.grad((value.double() * weight).sum(), leaves[:2])
    return [value.detach(), torch.cat([x.double().flatten() for x in gradients])]


def limit_of(inputs: Inputs, name: str, reference: list[Tensor]) -> tuple[float, float]:
    """Relative errors that float32 products can reach: every logit is known to sqrt(D) 2^-24 s |a| |c|.

    The derivative of each loss in a logit is at most `slope`, and so is what two logits' errors do to a derivative.
    """
    rows, columns, _, _, log_scale = inputs
    known_to = (
        math.sqrt(rows.shape[1]) * 2.0**-24 * log_scale.exp() * rows.norm(dim=1).max() * columns.norm(dim=1).max()
    )
    # sdm weighs log p - log q, which goes to -log 1e-8; its scalar is a mean, siglip's rows are sums over columns.
    slope = {"sdm": 2 * 18.4, "siglip": float(columns.shape[0])}.get(name, 2.0)
    per_value = slope * float(known_to)
    loss = per_value * math.sqrt(reference[0].numel()) / float(reference[0].norm())
    count = rows.shape[0] + columns.shape[0]
    unit = float(log_scale.exp() * torch.cat([rows, columns]).norm(dim=1).max())
    share = 1.0 / rows.shape[0] if name == "sdm" else 3.0
    gradient = 3 * per_value * unit * share * math.sqrt(count) / float(reference[1].norm())
    return loss, gradient


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pairs", "clip", "clip_ids", "sdm", "siglip"])
@pytest.mark.parametrize("case", list(CASES))
def test_pair_losses_are_as_exact_as_their_inputs_allow(
    queue_case: Callable, relative_error: Callable, case: str, name: str, dtype: torch.dtype, backend: str
) -> None:
    drawn = queue_case(
        **{"rows": 64, "keys": 81, "features": 96, "people": 20, "empty": 0.0, "random": 0.0, **CASES[case]},
        dtype=dtype,
    )
    inputs = drawn.attend()
    double = drawn.double().attend()
    reference = results(plain(name), double)
    found = results(kernel(name, backend), inputs)
    if float(reference[0].norm()) < 1e-12 or float(reference[1].norm()) < 1e-12:
        # One pair, or one person: there is nothing to learn, and a relative error of 0 means nothing.
        torch.testing.assert_close(found[1], torch.zeros_like(found[1]), rtol=0, atol=1e-4)
        return
    others = results(plain(name), inputs)
    rounded = relative_error(reference[1].to(dtype), reference[1])
    for x, y, other, gate, limit, floor in zip(
        found, reference, others, GATES[dtype], limit_of(double, name, reference), (3e-7, 1e-6), strict=True
    ):
        error = relative_error(x, y)
        assert error <= max(gate, limit, 1.01 * rounded if x is found[1] else 0.0)
        assert error <= 2 * relative_error(other, y) + floor


def exact_logits(values: list[float]) -> Inputs:
    """One row against columns whose logits are these numbers without any rounding: D = 1, scale 1."""
    columns = torch.tensor(values)[:, None]
    ids = torch.arange(len(values), dtype=torch.int32)
    return torch.ones(1, 1), columns, ids[:1], ids, torch.zeros(())


def test_a_rounded_lse_does_not_move_the_softmax() -> None:
    """At lse = 100 its float32 neighbours are 8e-6 apart; the gradient must be exact to 1e-6 all the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, columns, _, _, log_scale = exact_logits((100 + torch.rand(9, generator=generator)).tolist())
        rows.requires_grad_()
        row_lse, _ = pair_attend(rows, columns, log_scale, backend="chunked")
        row_lse.sum().backward()
        expected = (columns.double().softmax(dim=0) * columns.double()).sum()
        assert abs(float(rows.grad) / float(expected) - 1) < 5e-7


def test_a_tiny_mass_on_other_identities_keeps_its_digits() -> None:
    """1 + 2e-9 is 1 in float32: what sdm weighs with 18.4 would be lost in a float32 sum."""
    rows, columns, row_ids, column_ids, log_scale = exact_logits([100.0, 80.0, 79.5])
    row_4B, _ = operators.pair_statistics(rows, columns, row_ids, column_ids, log_scale, 1, True, "chunked")
    log_p = columns.double().squeeze(1).log_softmax(dim=0)
    expected = [(log_p.exp() * log_p).sum(), log_p[0].exp(), log_p[1:].exp().sum()]
    for x, y in zip(row_4B[1:, 0], expected, strict=True):
        assert float(x) == pytest.approx(float(y), rel=1e-6)
