"""What the triton kernels must compute, for the interpreter and for a GPU alike.

`python tests/kernels/triton_cases.py OUT.json` measures every case where it stands: TRITON_INTERPRET=1 must be set
before triton is imported, so the interpreter gets a process of its own (test_triton_interpreted.py).
Shape suffixes: B rows (anchors), K keys or columns, D features.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels import triton_launch
from reid_dist.kernels.checks import EMPTY, MASKS, RANDOM
from reid_dist.kernels.contrastive import (
    clip_contrastive,
    moco_nce,
    pair_attend,
    queue_attend,
    queue_attend_with_mean,
)
from reid_dist.kernels.triton_tiles import Tile

FLOAT, BF16 = torch.float32, torch.bfloat16
VALUE_GATE = {FLOAT: 1e-6, BF16: 1e-5}
GRADIENT_GATE = {FLOAT: 1e-5, BF16: 2e-3}
VALUE_SLACK = 3e-7
GRADIENT_SLACK = {FLOAT: 3e-7, BF16: 3e-4}
"""Below this an error is rounding of the result itself: plain torch may happen to have none there."""


class Case(NamedTuple):
    """One call and the inputs that make it hard."""

    op: str
    rows: int
    keys: int
    features: int
    dtype: torch.dtype
    mask: str = "identity"
    temperature: float = 0.07
    contents: str = "plain"
    small: bool = False
    """With tiles of 16 x 16, so that small inputs take many turns, splits and row blocks."""

    @property
    def name(self) -> str:
        dtype = "bf16" if self.dtype == BF16 else "fp32"
        size = f"{self.rows}x{self.keys}x{self.features}"
        return "-".join(
            [self.op, size, dtype, self.mask, str(self.temperature), self.contents] + ["small"] * self.small
        )


class Inputs(NamedTuple):
    """Tensors of one case; `positives` are the anchors' own keys."""

    anchors: Tensor
    positives: Tensor
    keys: Tensor
    anchor_ids: Tensor
    key_ids: Tensor
    log_scale: Tensor


def _cases() -> Iterator[Case]:
    for dtype in (FLOAT, BF16):
        for mask in MASKS:
            yield Case("queue", 70, 333, 64, dtype, mask)
            yield Case("queue", 37, 263, 40, dtype, mask, small=True)
            yield Case("pair", 70, 133, 64, dtype, mask)
            yield Case("pair", 37, 51, 40, dtype, mask, small=True)
        for rows, keys, features in ((1, 1, 16), (1, 100, 130), (17, 1, 48), (31, 127, 61), (5, 37, 3), (9, 1100, 96)):
            yield Case("queue", rows, keys, features, dtype)
        for features in (128, 257, 512):
            yield Case("queue", 19, 150, features, dtype)
            yield Case("pair", 19, 67, features, dtype)
        for rows, keys, features in ((1, 1, 16), (1, 100, 33), (23, 1, 48)):
            yield Case("pair", rows, keys, features, dtype, "none")
        for contents in ("duplicated", "masked", "one", "unnormalised", "random", "empty"):
            yield Case("queue", 13, 83, 32, dtype, contents=contents)
        for temperature in (0.01, 0.02):
            yield Case("queue", 29, 211, 64, dtype, temperature=temperature)
            yield Case("queue", 29, 211, 64, dtype, temperature=temperature, contents="duplicated")
        for temperature in (0.01, 0.07):
            yield Case("queue", 11, 211, 48, dtype, temperature=temperature, contents="rising", small=True)
            yield Case("pair", 11, 61, 48, dtype, temperature=temperature, contents="rising", small=True)
        for temperature in (0.01, 0.02):
            yield Case("nce", 29, 211, 64, dtype, temperature=temperature)
            yield Case("nce", 29, 211, 64, dtype, temperature=temperature, contents="easy")
        yield Case("nce", 41, 300, 128, dtype, "none")
        yield Case("nce", 41, 300, 128, dtype)
        yield Case("clip", 45, 45, 64, dtype)
        yield Case("clip", 45, 45, 64, dtype, temperature=0.02)


CASES = {case.name: case for case in _cases()}


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """Features about their person's direction, as in training; drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(len(case.name) + case.rows + case.keys)
    people = 6
    centre_PD = torch.randn(people, case.features, generator=generator, dtype=torch.float64)

    def draw(ids: Tensor, near: float = 0.5) -> Tensor:
        noise = torch.randn(ids.shape[0], case.features, generator=generator, dtype=torch.float64)
        return F.normalize(near * centre_PD[ids.clamp(min=0).long()] + (1 - near) * noise, dim=1)

    anchor_ids = torch.randint(people, (case.rows,), generator=generator, dtype=torch.int32)
    key_ids = torch.randint(people, (case.keys,), generator=generator, dtype=torch.int32)
    lot_K = torch.rand(case.keys, generator=generator)
    if case.keys > 3:
        key_ids[lot_K < 0.2] = RANDOM
        key_ids[lot_K < 0.1] = EMPTY
    if case.keys == 1:
        key_ids[:] = RANDOM
    anchors, keys = draw(anchor_ids), draw(key_ids)
    positives = draw(anchor_ids)
    if case.contents == "duplicated":
        keys[:] = keys[torch.randint(3, (case.keys,), generator=generator)]
    elif case.contents == "masked":
        anchor_ids[::2], key_ids[:] = 0, torch.where(key_ids == EMPTY, EMPTY, 0)
    elif case.contents == "one":
        key_ids[:] = EMPTY
        key_ids[case.keys // 2] = RANDOM
    elif case.contents == "unnormalised":
        anchors, keys = 2.5 * anchors, 0.6 * keys
    elif case.contents == "rising":
        # From opposite to equal: the running maximum grows from turn to turn, at temperature 0.01 by 2^288 in all.
        anchors = draw(torch.zeros_like(anchor_ids), near=0.95)
        along_K = torch.linspace(-1, 1, case.keys, dtype=torch.float64)[:, None]
        keys = along_K * F.normalize(centre_PD[0], dim=0) + (1 - along_K**2).sqrt() * keys
        key_ids[:] = RANDOM
    elif case.contents == "random":
        key_ids[:] = RANDOM
    elif case.contents == "empty":
        key_ids[:] = EMPTY
    elif case.contents == "easy":
        positives = anchors.clone()
    log_scale = torch.tensor(-math.log(case.temperature), dtype=torch.float32)
    made = (anchors.to(case.dtype), positives.to(case.dtype), keys.to(case.dtype), anchor_ids, key_ids, log_scale)
    return Inputs(*(x.to(device) for x in made))


@contextmanager
def tiles_of(case: Case) -> Iterator[None]:
    """The case's tiles: those of the table, or small ones."""
    if not case.small:
        yield
        return
    tile = Tile(16, 16, 4, 2, 16) if case.dtype == FLOAT else Tile(16, 16, 4, 2, 512, spread=True)
    with mock.patch.object(triton_launch, "tile_of", lambda *_: tile):
        yield


def run(case: Case, x: Inputs, backend: str) -> dict[str, Tensor]:
    """Values, and the gradients of a weighted sum of those that are finite."""
    leaves = {"anchors": x.anchors, "log_scale": x.log_scale, "keys": x.keys}
    if case.op in ("queue", "nce"):
        del leaves["keys"]
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    a, log_scale, k = leaves["anchors"], leaves["log_scale"], leaves.get("keys", x.keys)
    if case.op == "queue":
        values = (queue_attend(a, k, x.anchor_ids, x.key_ids, log_scale, mask=case.mask, backend=backend),)
    elif case.op == "nce":
        values = (moco_nce(a, x.positives, k, x.anchor_ids, x.key_ids, log_scale, mask=case.mask, backend=backend),)
    elif case.op == "pair":
        ids = {"row_ids_B": x.anchor_ids, "column_ids_G": x.key_ids, "mask": case.mask}
        values = pair_attend(a, k, log_scale, **ids, backend=backend)
    else:
        values = (clip_contrastive(a, k, log_scale, backend=backend),)
    generator = torch.Generator().manual_seed(1)
    # Upstream gradients that differ row by row, and are no unit.
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for value in values:
        weight = (0.3 + torch.rand(value.shape, generator=generator)).to(a.device)
        total = total + (weight * value.double().masked_fill(value == -torch.inf, 0.0)).sum()
    total.backward()
    found = {f"value{i}": value.detach() for i, value in enumerate(values)}
    return found | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def measure(case: Case, device: str = "cpu") -> dict[str, float]:
    """Relative norm error of each value and gradient against float64; `torch/...`: of plain torch on the same inputs.

    The gradient of the scale is one number, a sum over rows that may cancel: its error is relative to the largest
    that the rows' gradients could make it.
    """
    x = inputs(case, device)
    wide = Inputs(*(t.double() if t.is_floating_point() else t for t in x))
    expected = run(case, wide, "reference")
    plain = run(case, x, "reference")
    with tiles_of(case):
        ours = run(case, x, "triton")
    errors = {}
    for prefix, found in (("", ours), ("torch/", plain)):
        for name, reference in expected.items():
            size = reference
            if name == "log_scale":
                size = (wide.anchors * expected["anchors"]).sum(dim=1).abs().sum()
            errors[prefix + name] = relative_error(found[name], reference, size)
    return errors


def relative_error(found: Tensor, reference: Tensor, size: Tensor) -> float:
    """||found - reference|| / ||size||, of the finite entries; infinite where the others are not the same ones."""
    finite = reference.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite].double(), reference[~finite]):
        return math.inf
    difference = (found.double() - reference)[finite].norm()
    length = size[size.isfinite()].norm()
    return float(difference / length) if length > 0 else float(difference)


def beyond_gate(case: Case, errors: dict[str, float]) -> list[str]:
    """Every error above its gate, or more than twice plain torch's (float32 logits, same inputs).

    Where plain torch itself is beyond the gate, it is the gate: of a bfloat16 gradient the last rounding alone costs
    1.7e-3, and a loss of 1e-20 is the difference of two logits of 50.
    """
    found = []
    for name, error in errors.items():
        if name.startswith("torch/"):
            continue
        plain = errors[f"torch/{name}"]
        if name.startswith("value"):
            gate, slack = VALUE_GATE[case.dtype], VALUE_SLACK
        else:
            gate, slack = GRADIENT_GATE[case.dtype], GRADIENT_SLACK[case.dtype]
        limit = max(min(gate, 2 * plain + slack), 1.1 * plain)
        if not error <= limit:
            found.append(f"{name}: {error:.2e} > {limit:.2e} (plain torch {plain:.2e})")
    return found


# Properties, each a function of the device that asserts


def check_nan_stays_in_its_row(device: str) -> None:
    for dtype in (FLOAT, BF16):
        x = inputs(Case("queue", 9, 40, 24, dtype), device)
        clean = queue_attend_with_mean(*_attend(x), backend="triton")
        x.anchors[4, 3] = math.nan
        lse, mean = queue_attend_with_mean(*_attend(x), backend="triton")
        assert lse[4].isnan()
        assert mean[4].isnan().all()
        others = torch.arange(9) != 4
        assert torch.equal(lse[others], clean[0][others])
        assert torch.equal(mean[others], clean[1][others])


def check_nan_key_reaches_all_who_count_it(device: str) -> None:
    for dtype in (FLOAT, BF16):
        x = inputs(Case("queue", 9, 40, 24, dtype), device)
        x.key_ids[7], x.keys[7] = RANDOM, math.nan
        lse, mean = queue_attend_with_mean(*_attend(x), backend="triton")
        assert lse.isnan().all()
        assert mean.isnan().all()
        row, column = pair_attend(
            x.anchors, x.keys, x.log_scale, row_ids_B=x.anchor_ids, column_ids_G=x.key_ids, backend="triton"
        )
        assert row.isnan().all()
        assert column[7].isnan()
        assert not column[:7].isnan().any()


def check_what_an_empty_slot_holds_is_never_read(device: str) -> None:
    for dtype in (FLOAT, BF16):
        x = inputs(Case("queue", 9, 40, 24, dtype), device)
        clean = queue_attend_with_mean(*_attend(x), backend="triton")
        x.keys[x.key_ids == EMPTY] = math.nan
        for found, expected in zip(queue_attend_with_mean(*_attend(x), backend="triton"), clean, strict=True):
            assert torch.equal(found, expected)


def check_no_rows_or_no_keys(device: str) -> None:
    for rows, keys in ((0, 5), (5, 0), (0, 0)):
        x = inputs(Case("queue", rows, keys, 24, BF16), device)
        lse, mean = queue_attend_with_mean(*_attend(x), backend="triton")
        assert lse.shape == (rows,)
        assert (lse == -torch.inf).all()
        assert mean.shape == (rows, 24)
        assert (mean == 0).all()
        row, column = triton_launch.pair_statistics(
            x.anchors, x.keys, x.anchor_ids, x.key_ids, x.log_scale, MASKS.index("none")
        )
        assert row.shape == (rows,)
        assert column.shape == (keys,)
        assert (torch.cat([row, column]) == -torch.inf).all()


def check_a_row_depends_on_no_other(device: str) -> None:
    """Bitwise: alone, in a batch, and with so little workspace that every block of rows is a launch of its own."""
    case = Case("queue", 41, 300, 40, BF16, small=True)
    x = inputs(case, device)
    with tiles_of(case):
        lse, mean = queue_attend_with_mean(*_attend(x), backend="triton")
        for rows in (slice(0, 1), slice(20, 37)):
            part = (x.anchors[rows], x.keys, x.anchor_ids[rows], x.key_ids, x.log_scale)
            found = queue_attend_with_mean(*part, backend="triton")
            assert torch.equal(found[0], lse[rows])
            assert torch.equal(found[1], mean[rows])
        with mock.patch.object(triton_launch, "WORKSPACE_BYTES", 1):
            found = queue_attend_with_mean(*_attend(x), backend="triton")
        assert torch.equal(found[0], lse)
        assert torch.equal(found[1], mean)


def check_any_number_of_splits(device: str) -> None:
    for dtype, tolerance in ((FLOAT, 1e-6), (BF16, 2e-3)):
        x = inputs(Case("queue", 9, 400, 40, dtype), device)
        tile = Tile(16, 16, 4, 2, 512 if dtype == BF16 else 16)
        found = [triton_launch.queue_attend_forward(*_attend(x), 0, tile=tile, splits=splits) for splits in (1, 2, 4)]
        for lse, mean in found[1:]:
            torch.testing.assert_close(lse, found[0][0], rtol=1e-6, atol=0)
            assert relative_error(mean.double(), found[0][1].double(), found[0][1]) < tolerance


def check_rows_with_a_stride(device: str) -> None:
    x = inputs(Case("queue", 21, 50, 24, BF16), device)
    wide = x._replace(anchors=x.anchors.repeat(1, 2)[:, :24], keys=x.keys.t().contiguous().t())
    for found, expected in zip(
        queue_attend_with_mean(*_attend(wide), backend="triton"),
        queue_attend_with_mean(*_attend(x), backend="triton"),
        strict=True,
    ):
        assert torch.equal(found, expected)


def _attend(x: Inputs) -> tuple[Tensor, ...]:
    return (x.anchors, x.keys, x.anchor_ids, x.key_ids, x.log_scale)


PROPERTIES: dict[str, Callable[[str], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def broken(name: str, device: str) -> str | None:
    """What is wrong with a property, and in which line; None where it holds."""
    try:
        PROPERTIES[name](device)
    except AssertionError as error:
        assert error.__traceback__ is not None and error.__traceback__.tb_next is not None
        return f"{error!r} in line {error.__traceback__.tb_next.tb_lineno}"
    return None


def main(out: str) -> None:
    """Measures all cases on the CPU, interpreted: {case: errors} and {property: what is wrong, or None}."""
    torch.set_num_threads(1)
    report: dict[str, dict] = {"cases": {}, "properties": {}}
    for name, case in CASES.items():
        report["cases"][name] = measure(case)
    for name in PROPERTIES:
        report["properties"][name] = broken(name, "cpu")
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
