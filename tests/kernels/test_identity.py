"""Means over identities beside loops, and their gradient."""

from collections.abc import Callable

import pytest
import torch

from reid_dist.kernels import identity
from reid_dist.kernels.contrastive import EMPTY, RANDOM, identity_means
from reid_dist.kernels.identity import among, identity_counts


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_CHUNK_ELEMENTS", 40)


@pytest.mark.parametrize(("rows", "wanted"), [(0, 3), (5, 0), (1, 1), (37, 11), (11, 37)])
def test_means_and_counts_are_those_of_a_loop(queue_case: Callable, device: str, rows: int, wanted: int) -> None:
    case = queue_case(wanted, rows, 6, dtype=torch.float64, people=5, device=device)
    # Two more that nobody has.
    wanted_ids = torch.cat([case.anchor_ids_B, torch.tensor([77, EMPTY], dtype=torch.int32, device=device)])
    mean, count = identity_means(case.keys_KD, case.key_ids_K, wanted_ids)
    for i, own in enumerate(wanted_ids.tolist()):
        chosen = [x for x, j in zip(case.keys_KD, case.key_ids_K.tolist(), strict=True) if j == own != EMPTY]
        assert count[i] == len(chosen)
        expected = torch.stack(chosen).mean(dim=0) if chosen else torch.zeros(6, dtype=torch.float64, device=device)
        torch.testing.assert_close(mean[i], expected)


def test_the_gradient_reaches_every_row_of_a_wanted_identity() -> None:
    ids = torch.tensor([3, 1, EMPTY, 3, 9, 1, 3], dtype=torch.int32)
    wanted = torch.tensor([3, 3, 1, 4], dtype=torch.int32)
    features = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: identity_means(x, ids, wanted)[0], (features,))
    identity_means(features, ids, wanted)[0].sum().backward()
    assert (features.grad != 0).all(dim=1).tolist() == [True, True, False, True, False, True, True]


def test_unwanted_rows_may_hold_anything(device: str) -> None:
    ids = torch.tensor([3, EMPTY, 8, RANDOM], dtype=torch.int32, device=device)
    features = torch.full((4, 2), torch.nan, device=device)
    features[0] = 2.0
    mean, count = identity_means(features, ids, torch.tensor([3, 5], dtype=torch.int32, device=device))
    assert mean.tolist() == [[2, 2], [0, 0]] and count.tolist() == [1, 0]


def test_means_of_bfloat16_are_summed_in_float32(queue_case: Callable, relative_error: Callable) -> None:
    case = queue_case(5, 4000, 8, people=2, dtype=torch.bfloat16)
    mean, _ = identity_means(case.keys_KD, case.key_ids_K, case.anchor_ids_B)
    expected, _ = identity_means(case.keys_KD.double(), case.key_ids_K, case.anchor_ids_B)
    assert mean.dtype == torch.float32 and relative_error(mean, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_is_registered_rightly(dtype: torch.dtype) -> None:
    features = torch.randn(20, 4).to(dtype).requires_grad_()
    slot, found = torch.randint(3, (20,)), torch.rand(20) < 0.5
    torch.library.opcheck(identity.slot_sums, (features, slot, found, 3))


def test_among_and_counts(queue_case: Callable) -> None:
    case = queue_case(9, 50)
    ids, wanted = case.key_ids_K, case.anchor_ids_B
    assert among(ids, wanted).tolist() == [i in set(wanted.tolist()) for i in ids.tolist()]
    assert not among(ids, wanted[:0]).any()
    assert identity_counts(ids, wanted).tolist() == [ids.tolist().count(i) for i in wanted.tolist()]
