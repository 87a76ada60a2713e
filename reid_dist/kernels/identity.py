"""Means over the rows of an identity, without a host sync.

Shape suffixes: B wanted ids, K rows, D features.
"""

from typing import Any

import torch
from torch import Tensor

from reid_dist.kernels.checks import EMPTY, check_features, check_ids, wide_dtype

_CHUNK_ELEMENTS = 2**21


def among(ids_K: Tensor, wanted_ids_U: Tensor) -> Tensor:
    """Whether each id is one of `wanted_ids_U`; O((K + U) log U), sync-free. Shape: (K,), bool."""
    return among_sorted(ids_K, wanted_ids_U.sort().values)


def among_sorted(ids_K: Tensor, sorted_ids_U: Tensor) -> Tensor:
    """`among` of ids that are sorted already."""
    if sorted_ids_U.shape[0] == 0:
        return torch.zeros_like(ids_K, dtype=torch.bool)
    return sorted_ids_U[_position(ids_K, sorted_ids_U)] == ids_K


def identity_means(features_KD: Tensor, ids_K: Tensor, wanted_ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each wanted identity; differentiable in the features.

    Args:
        features_KD: Shape: (K, D).
        ids_K: int32; rows of id EMPTY belong to nobody. Shape: (K,).
        wanted_ids_B: int32, may repeat. Shape: (B,).

    Returns:
        Means, at least float32, zeros where there is no row. Shape: (B, D).
        Number of rows of each wanted identity, in the dtype of the means. Shape: (B,).
    """
    check_features(features=features_KD)
    check_ids("ids", ids_K, features_KD.shape[0])
    check_ids("wanted_ids", wanted_ids_B, wanted_ids_B.shape[0])
    wide, wanted = wide_dtype(features_KD.dtype), wanted_ids_B.shape[0]
    if features_KD.shape[0] == 0 or wanted == 0:
        nothing_BD = features_KD.new_zeros((wanted, features_KD.shape[1]), dtype=wide)
        return nothing_BD + features_KD.sum(), nothing_BD.sum(dim=1)
    sorted_B = wanted_ids_B.sort().values
    slot_K = _position(ids_K, sorted_B)
    found_K = (sorted_B[slot_K] == ids_K) & (ids_K != EMPTY)
    sum_BD: Tensor = slot_sums(features_KD, slot_K, found_K, wanted)
    count_B = sum_BD.new_zeros(wanted).index_add(0, slot_K, found_K.to(wide))
    # A repeated identity was collected in its first slot.
    first_B = torch.searchsorted(sorted_B, wanted_ids_B)
    count_B = count_B[first_B]
    return sum_BD[first_B] / count_B.clamp(min=1)[:, None], count_B


@torch.library.custom_op("reid_dist::slot_sums", mutates_args=())
def slot_sums(features_KD: Tensor, slot_K: Tensor, found_K: Tensor, slots: int) -> Tensor:
    """Sum of the found rows of each slot, at least float32; differentiable in the features. Shape: (slots, D)."""
    sum_SD = features_KD.new_zeros((slots, features_KD.shape[1]), dtype=wide_dtype(features_KD.dtype))
    width = max(1, _CHUNK_ELEMENTS // max(1, features_KD.shape[1]))
    add = _add_found if features_KD.device.type == "cpu" else _add_all
    for start in range(0, features_KD.shape[0], width):
        part = slice(start, start + width)
        add(sum_SD, features_KD[part], slot_K[part], found_K[part])
    return sum_SD


def _add_found(sum_SD: Tensor, features_CD: Tensor, slot_C: Tensor, found_C: Tensor) -> None:
    # Few keys of a queue belong to a person of the batch.
    index_N = found_C.nonzero().squeeze(1)
    sum_SD.index_add_(0, slot_C[index_N], features_CD[index_N].to(sum_SD.dtype))


def _add_all(sum_SD: Tensor, features_CD: Tensor, slot_C: Tensor, found_C: Tensor) -> None:
    """As `_add_found` without a host sync, which to know the number of found rows would be on a GPU."""
    # Rows that nobody wants add zero, each to another slot: one common slot would be a queue. index_put_ sorts and
    # adds in order, index_add_ would add in any order.
    spread_C = torch.arange(slot_C.shape[0], device=slot_C.device) % sum_SD.shape[0]
    kept_CD = features_CD.to(sum_SD.dtype).masked_fill(~found_C[:, None], 0.0)
    sum_SD.index_put_((torch.where(found_C, slot_C, spread_C),), kept_CD, accumulate=True)


@slot_sums.register_fake
def _(features_KD: Tensor, slot_K: Tensor, found_K: Tensor, slots: int) -> Tensor:
    return features_KD.new_empty((slots, features_KD.shape[1]), dtype=wide_dtype(features_KD.dtype))


def _save_slots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.dtype = inputs[0].dtype


def _slots_backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
    slot_K, found_K = ctx.saved_tensors
    return grad_SD[slot_K].masked_fill(~found_K[:, None], 0.0).to(ctx.dtype), None, None, None


slot_sums.register_autograd(_slots_backward, setup_context=_save_slots)


def identity_counts(ids_K: Tensor, wanted_ids_B: Tensor) -> Tensor:
    """Number of rows of each wanted identity; 0 for EMPTY. Shape: (B,), int64."""
    sorted_K = ids_K.sort().values
    last_B = torch.searchsorted(sorted_K, wanted_ids_B, right=True)
    return (last_B - torch.searchsorted(sorted_K, wanted_ids_B)).masked_fill(wanted_ids_B == EMPTY, 0)


def _position(ids_K: Tensor, sorted_U: Tensor) -> Tensor:
    return torch.searchsorted(sorted_U, ids_K).clamp(max=sorted_U.shape[0] - 1)
