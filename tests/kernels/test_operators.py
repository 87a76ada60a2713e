"""The operators under torch.compile: registered rightly, without graph breaks, the same bits as eager."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.kernels import operators
from reid_dist.kernels.contrastive import clip_contrastive, identity_means, moco_nce, sdm, siglip, supcon_queue

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def pair_inputs(queue_case: Callable) -> Callable[..., tuple[Tensor, ...]]:
    """(rows, columns, row ids, column ids, log_scale), all that can be trained wanting gradients."""

    def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        case = queue_case(6, 9, 5, dtype=dtype, random=0.0).leaves()
        keys = case.keys_KD.clone().requires_grad_()
        return case.anchors_BD, keys, case.anchor_ids_B, case.key_ids_K, case.log_scale

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [0, 1, 2])
def test_queue_attend_is_registered_rightly(queue_case: Callable, dtype: torch.dtype, mask: int) -> None:
    case = queue_case(6, 40, 5, dtype=dtype).leaves()
    torch.library.opcheck(operators.queue_attend, (*case.attend(), mask, "chunked"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [False, True])
def test_pair_operators_are_registered_rightly(pair_inputs: Callable, dtype: torch.dtype, moments: bool) -> None:
    inputs = pair_inputs(dtype)
    torch.library.opcheck(operators.pair_statistics, (*inputs, 1, moments, "chunked"))
    with torch.no_grad():
        row_SB, column_SG = operators.pair_statistics(*inputs, 1, moments, "chunked")
    coefficients = [torch.rand(3 if moments else 1, n, dtype=torch.float64) for n in (6, 9)]
    detached = [x.detach() for x in inputs]
    torch.library.opcheck(operators.pair_gradients, (*detached, 1, row_SB[0], column_SG[0], *coefficients, "chunked"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_siglip_is_registered_rightly(pair_inputs: Callable, dtype: torch.dtype) -> None:
    inputs = pair_inputs(dtype)
    bias = torch.tensor(-2.0, dtype=inputs[4].dtype, requires_grad=True)
    torch.library.opcheck(operators.siglip, (*inputs, bias))
    weight = torch.rand(6, dtype=torch.float64)
    torch.library.opcheck(operators.siglip_gradients, (*(x.detach() for x in (*inputs, bias)), weight))


def loss_and_gradients(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    value = loss(*leaves).square().sum()  # a gradient that is not 1
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def losses(case: tuple, pairs: tuple) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    rest = case[1:5]
    rows, columns, row_ids, column_ids, log_scale = pairs
    bias = torch.tensor(-2.0, requires_grad=True)
    queue_leaves, pair_leaves = [case[0], case[5]], [rows, columns, log_scale]
    kwargs = {"backend": "chunked"}
    return {
        "moco": (lambda a, s: moco_nce(a, *rest, s, **kwargs), queue_leaves),
        "batch": (lambda a, s: moco_nce(a, *rest, s, mask="none", batch_ids_U=rest[2], **kwargs), queue_leaves),
        "supcon": (lambda a, s: supcon_queue(a, *rest[1:], s, **kwargs), queue_leaves),
        "clip": (lambda a, c, s: clip_contrastive(a, c[:6], s, **kwargs), pair_leaves),
        "clip_ids": (lambda a, c, s: clip_contrastive(a, c[:6], s, row_ids, **kwargs), pair_leaves),
        "sdm": (lambda a, c, s: sdm(a, c, row_ids, column_ids, s, **kwargs), pair_leaves),
        "siglip": (lambda a, c, s, b: siglip(a, c, row_ids, column_ids, s, b, **kwargs), [*pair_leaves, bias]),
        "means": (lambda c: identity_means(c, column_ids, row_ids)[0], [columns]),
    }


NAMES = ("moco", "batch", "supcon", "clip", "clip_ids", "sdm", "siglip", "means")


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_loss_has_the_same_bits_and_no_graph_break(
    queue_case: Callable, pair_inputs: Callable, name: str
) -> None:
    loss, leaves = losses(queue_case(6, 40, 5).leaves(), pair_inputs())[name]
    torch.compiler.reset()
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = loss_and_gradients(loss, leaves)
    for x, y in zip(loss_and_gradients(traced, leaves), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_inductor_compiles_the_loss_whole(queue_case: Callable) -> None:
    case = queue_case(6, 40, 5).leaves()
    loss, leaves = losses(case, (None,) * 5)["moco"]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    assert torch.equal(compiled(*leaves), loss(*leaves))
    expected = loss_and_gradients(loss, leaves)
    for x, y in zip(loss_and_gradients(compiled, leaves), expected, strict=True):
        # Where it fuses the sums that surround the operator, it may add in another order on another processor.
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_a_new_number_of_rows_needs_no_other_code(queue_case: Callable) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda case: moco_nce(*case, backend="chunked"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows, keys in ((5, 30), (8, 44)):
        case = queue_case(rows, keys, 5)
        assert torch.equal(compiled(case), moco_nce(*case, backend="chunked"))


def test_repeated_calls_have_the_same_bits(queue_case: Callable, pair_inputs: Callable, small_tiles: None) -> None:
    found = losses(queue_case(23, 90, 13).leaves(), pair_inputs())
    for loss, leaves in found.values():
        first = loss_and_gradients(loss, leaves)
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(loss_and_gradients(loss, leaves), first, strict=True))


def test_inference_mode_leaves_no_buffer_behind_that_training_could_not_write(queue_case: Callable) -> None:
    from reid_dist.kernels import workspace

    workspace._kept.__dict__.clear()
    case = queue_case().leaves()
    with torch.inference_mode():
        expected = moco_nce(*case, backend="chunked")
    found = moco_nce(*case, backend="chunked")
    assert torch.equal(found, expected)
    found.sum().backward()
