"""The chunked backend's path for GPUs, on a machine without one: its numbers on the CPU, its calls on fake tensors.

Fake CUDA tensors have shapes and no values: whatever would look at a value (a host sync) raises.
"""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from reid_dist.kernels import chunked, chunked_pairs, identity
from reid_dist.kernels.chunked import queue_attend


@pytest.mark.parametrize("mask", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("small_tiles")
def test_both_paths_of_the_queue_have_the_same_numbers(
    queue_case: Callable, relative_error: Callable, monkeypatch: pytest.MonkeyPatch, mask: int, dtype: torch.dtype
) -> None:
    case = queue_case(13, 90, 11, people=4, dtype=dtype)
    case.keys_KD[case.key_ids_K == -1] = torch.nan
    expected = queue_attend(*case.attend(), mask)
    monkeypatch.setattr(chunked, "_attend_on_cpu", chunked._attend_on_gpu)
    for x, y in zip(queue_attend(*case.attend(), mask), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_both_paths_of_the_means_have_the_same_numbers(queue_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    case = queue_case(9, 50, 3, people=4, dtype=torch.float64)
    expected = identity.identity_means(case.keys_KD, case.key_ids_K, case.anchor_ids_B)
    monkeypatch.setattr(identity, "_add_found", identity._add_all)
    found = identity.identity_means(case.keys_KD, case.key_ids_K, case.anchor_ids_B)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_gpu(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        anchors, keys = (torch.empty(n, 64, device="cuda", dtype=dtype) for n in (300, 9000))
        ids, key_ids = (torch.empty(n, device="cuda", dtype=torch.int32) for n in (300, 9000))
        scale = torch.empty((), device="cuda")
        arguments = (anchors, keys, ids, key_ids, scale)
        for mask in range(3):
            lse, mean = queue_attend(*arguments, mask)
            assert (lse.dtype, mean.dtype) == (torch.float64, torch.float32)
        queue_attend(anchors.float(), *arguments[1:], 0)
        for moments in (False, True):
            row_SB, column_SG = chunked_pairs.pair_statistics(*arguments, 1, moments)
            kept = slice(1, 4) if moments else slice(0, 1)
            gradients = chunked_pairs.pair_gradients(
                *arguments, 1, row_SB[0], column_SG[0], row_SB[kept], column_SG[kept]
            )
            assert all(x.dtype == torch.float32 for x in gradients)
        loss = chunked_pairs.siglip_loss(*arguments, scale)
        chunked_pairs.siglip_gradients(*arguments, scale, loss)
        identity.identity_means(keys, key_ids, ids)
        identity._add_all(torch.empty(4, 64, device="cuda"), keys, key_ids.long(), key_ids > 0)


def test_a_wait_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(3, device="cuda").sum().item()
