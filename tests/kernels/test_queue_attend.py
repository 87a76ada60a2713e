"""queue_attend beside loops over every pair: which keys count, and what happens at the edges."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.kernels import chunked
from reid_dist.kernels.contrastive import EMPTY, RANDOM, queue_attend, queue_attend_with_mean

BACKENDS = ("reference", "chunked")
pytestmark = pytest.mark.usefixtures("small_tiles")


def counts(anchor_id: int, key_id: int, mask: str, batch: set[int]) -> bool:
    if key_id == EMPTY or key_id in batch:
        return False
    return {"none": True, "identity": key_id != anchor_id, "positives": key_id == anchor_id}[mask]


def by_loops(
    anchors: Tensor, keys: Tensor, anchor_ids: Tensor, key_ids: Tensor, log_scale: Tensor, mask: str, batch: set[int]
) -> tuple[list[float], list[list[float]]]:
    """(lse, mean key) with Python's floats, one pair after the other."""
    scale = math.exp(float(log_scale))
    lse, mean = [], []
    for a, own in zip(anchors.tolist(), anchor_ids.tolist(), strict=True):
        terms = [
            (scale * sum(x * y for x, y in zip(a, k, strict=True)), k)
            for k, other in zip(keys.tolist(), key_ids.tolist(), strict=True)
            if counts(own, other, mask, batch)
        ]
        peak = max((s for s, _ in terms), default=0.0)
        total = math.fsum(math.exp(s - peak) for s, _ in terms)
        lse.append(peak + math.log(total) if terms else -math.inf)
        mean.append([math.fsum(math.exp(s - peak) * k[d] for s, k in terms) / (total or 1.0) for d in range(len(a))])
    return lse, mean


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["identity", "none", "positives", "batch"])
def test_every_mask_counts_what_a_loop_counts(queue_case: Callable, device: str, backend: str, mask: str) -> None:
    case = queue_case(11, 37, 5, dtype=torch.float64, people=6, device=device)
    batch = case.anchor_ids_B[:3] if mask == "batch" else None
    mask = "none" if mask == "batch" else mask
    found = queue_attend_with_mean(*case.attend(), mask=mask, batch_ids_U=batch, backend=backend)
    left_out = set() if batch is None else set(batch.tolist())
    for x, expected in zip(found, by_loops(*case.attend(), mask, left_out), strict=True):
        torch.testing.assert_close(x.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 13])
@pytest.mark.parametrize("keys", [0, 1, 7, 31])
def test_any_number_of_rows_and_keys(queue_case: Callable, backend: str, rows: int, keys: int) -> None:
    case = queue_case(rows, keys, 3, dtype=torch.float64, people=3).leaves()
    lse = queue_attend(*case.attend(), backend=backend)
    expected, mean = by_loops(*(x.detach() for x in case.attend()), "identity", set())
    torch.testing.assert_close(lse.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    lse.masked_fill(lse == -torch.inf, 0.0).sum().backward()
    gradient = case.log_scale.exp().detach() * torch.tensor(mean, dtype=torch.float64).reshape(rows, 3)
    torch.testing.assert_close(case.anchors_BD.grad, gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_keys_count_and_equal_nobody(queue_case: Callable, device: str, backend: str) -> None:
    case = queue_case(6, 40, 4, dtype=torch.float64, empty=0.0, random=0.0, device=device)
    ids = torch.full_like(case.key_ids_K, RANDOM)
    arguments = (case.anchors_BD, case.keys_KD, case.anchor_ids_B, ids, case.log_scale)
    all_counted = queue_attend(*arguments, mask="none", backend=backend)
    torch.testing.assert_close(queue_attend(*arguments, mask="identity", backend=backend), all_counted)
    assert (queue_attend(*arguments, mask="positives", backend=backend) == -torch.inf).all()
    batch = case.anchor_ids_B
    torch.testing.assert_close(queue_attend(*arguments, mask="none", batch_ids_U=batch, backend=backend), all_counted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["identity", "none", "positives"])
def test_what_an_empty_slot_holds_does_not_matter(queue_case: Callable, device: str, backend: str, mask: str) -> None:
    case = queue_case(9, 30, 4, empty=0.4, people=3, device=device)
    empty = case.key_ids_K == EMPTY
    assert empty.any()
    expected = queue_attend_with_mean(*case.attend(), mask=mask, backend=backend)
    for rubbish in (torch.nan, torch.inf, 1e30):
        keys = case.keys_KD.masked_fill(empty[:, None], rubbish)
        found = queue_attend_with_mean(*case._replace(keys_KD=keys).attend(), mask=mask, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["empty", "own"])
def test_a_row_that_counts_nothing_is_a_constant(queue_case: Callable, device: str, backend: str, state: str) -> None:
    case = queue_case(5, 20, 4, people=1, empty=0.0, random=0.0, device=device).leaves()
    if state == "empty":
        case = case._replace(key_ids_K=torch.full_like(case.key_ids_K, EMPTY))
    lse = queue_attend(*case.attend(), backend=backend)
    assert (lse == -torch.inf).all()
    # The gradient of a caller may be anything there, even infinite.
    lse.backward(torch.full_like(lse, torch.inf))
    assert (case.anchors_BD.grad == 0).all()
    assert case.log_scale.grad == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_unmasked_key_is_its_own_log_sum_exp(queue_case: Callable, device: str, backend: str) -> None:
    case = queue_case(5, 20, 4, people=1, empty=0.0, random=0.0, device=device).leaves()
    case.key_ids_K[13] = 3
    lse = queue_attend(*case.attend(), backend=backend)
    expected = case.log_scale.exp() * case.anchors_BD @ case.keys_KD[13]
    torch.testing.assert_close(lse, expected)
    lse.sum().backward()
    torch.testing.assert_close(case.anchors_BD.grad, (case.log_scale.exp() * case.keys_KD[13]).expand(5, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_comes_out_as_nan(queue_case: Callable, device: str, backend: str) -> None:
    case = queue_case(6, 40, 4, empty=0.0, random=0.0, device=device)
    one_anchor = case.anchors_BD.clone()
    one_anchor[2, 1] = torch.nan
    lse = queue_attend(*case._replace(anchors_BD=one_anchor).attend(), mask="none", backend=backend)
    assert lse.isnan().tolist() == [False, False, True, False, False, False]
    one_key = case.keys_KD.clone()
    one_key[30, 0] = torch.nan
    leaves = case._replace(keys_KD=one_key).leaves()
    lse = queue_attend(*leaves.attend(), mask="none", backend=backend)
    assert lse.isnan().all()
    lse.sum().backward()
    assert leaves.anchors_BD.grad.isnan().all()


@pytest.mark.parametrize("width", [1, 3, 7, 100])
def test_the_split_into_chunks_changes_only_rounding(
    queue_case: Callable, relative_error: Callable, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    case = queue_case(17, 91, 12)
    expected = queue_attend_with_mean(*case.double().attend(), backend="reference")
    monkeypatch.setattr(chunked, "_chunk_width", lambda *_: width)
    for x, y in zip(queue_attend_with_mean(*case.attend(), backend="chunked"), expected, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_queue_combine_to_the_whole(queue_case: Callable, backend: str) -> None:
    case = queue_case(8, 50, 6, dtype=torch.float64)
    expected = queue_attend_with_mean(*case.attend(), backend=backend)
    parts = [
        queue_attend_with_mean(
            case.anchors_BD,
            case.keys_KD[part],
            case.anchor_ids_B,
            case.key_ids_K[part],
            case.log_scale,
            backend=backend,
        )
        for part in (slice(0, 11), slice(11, 11), slice(11, 50))
    ]
    lse_RB = torch.stack([lse for lse, _ in parts])
    lse = lse_RB.logsumexp(dim=0)
    mean = sum((part_lse - lse).exp()[:, None] * mean for part_lse, mean in parts)
    torch.testing.assert_close((lse, mean), expected, rtol=1e-12, atol=1e-14)


def test_the_mean_key_has_no_gradient(queue_case: Callable) -> None:
    case = queue_case().leaves()
    for backend in BACKENDS:
        lse, mean = queue_attend_with_mean(*case.attend(), backend=backend)
        assert not lse.requires_grad and not mean.requires_grad


def test_autocast_does_not_reach_the_logits(queue_case: Callable) -> None:
    case = queue_case(9, 70, 32)
    for backend in BACKENDS:
        plain = queue_attend(*case.attend(), backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(queue_attend(*case.attend(), backend=backend), plain)


def test_wide_anchors_meet_narrow_keys_without_loss_on_the_cpu(queue_case: Callable) -> None:
    """As training has them: anchors normalised in float32, a bfloat16 queue."""
    case = queue_case(9, 70, 32)
    case = case._replace(keys_KD=case.keys_KD.bfloat16()).leaves()
    lse = queue_attend(*case.attend(), backend="chunked")
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), queue_attend(*case.double().attend()), rtol=1e-6, atol=1e-6)
    lse.sum().backward()
    assert case.anchors_BD.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_may_have_one_dimension(queue_case: Callable, shape: tuple[int, ...], backend: str) -> None:
    case = queue_case()
    case = case._replace(log_scale=case.log_scale.reshape(shape)).leaves()
    queue_attend(*case.attend(), backend=backend).sum().backward()
    assert case.log_scale.grad.shape == shape


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keys_KD": torch.zeros(33, 15)}, ValueError, "15 features"),
        ({"keys_KD": torch.zeros(33, 16, requires_grad=True)}, ValueError, "pair_attend"),
        ({"keys_KD": torch.zeros(33, 16, dtype=torch.float64)}, TypeError, "float64"),
        ({"keys_KD": torch.zeros(33, 16, dtype=torch.int32)}, TypeError, "keys has dtype"),
        ({"keys_KD": torch.zeros(33)}, ValueError, "shape"),
        ({"anchor_ids_B": torch.zeros(7, dtype=torch.int64)}, TypeError, "int32"),
        ({"key_ids_K": torch.zeros(32, dtype=torch.int32)}, ValueError, "33 rows"),
        ({"log_scale": torch.zeros(2)}, ValueError, "log_scale"),
        ({"log_scale": torch.zeros((), dtype=torch.int64)}, TypeError, "log_scale"),
    ],
)
def test_wrong_calls_are_refused(queue_case: Callable, change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        queue_attend(*queue_case()._replace(**change).attend())


def test_wrong_options_are_refused(queue_case: Callable) -> None:
    case = queue_case()
    with pytest.raises(ValueError, match="mask is 'same'"):
        queue_attend(*case.attend(), mask="same")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask='none'"):
        queue_attend(*case.attend(), batch_ids_U=case.anchor_ids_B)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        queue_attend(*case.attend(), backend="cuda")  # type: ignore[arg-type]
