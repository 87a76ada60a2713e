"""Attention of anchors over a queue in one pass over chunks of keys, with an online softmax.

A tile of products is made, masked, exponentiated and multiplied with its keys while it is in the cache; no tensor of
B x K exists. Logits are in powers of 2: exp2 is the fastest exponential that torch vectorises. The CPU looks at the
ids of a chunk to skip what is not counted; on a GPU that would be a host sync, so the whole tile is masked there.
Shape suffixes: B anchors, K keys, D features; R anchors and C keys of a tile.
"""

import math

import torch
from torch import Tensor

from reid_dist.kernels.checks import EMPTY, MASKS, wide_dtype
from reid_dist.kernels.identity import among_sorted
from reid_dist.kernels.workspace import buffer, on_tensor_cores, product

# Measured with D = 512: fewer than 512 rows slow the products down (128: by 10 %); 512 to 8192 keys differ by 4 %, so
# 2048 for fewer turns, whose threads wait for each other; 4 MB of products.
_CPU_ROWS, _CPU_TILE = 512, 2**20
# At most 16 MB of products, which an L2 of 50 MB holds, and few launches.
_GPU_ROWS, _GPU_TILE = 4096, 2**22
# Elements of a chunk's keys, which may be copied (widened, or without empty slots). More on a GPU, where few anchors
# would otherwise mean many small launches.
_CPU_CHUNK, _GPU_CHUNK = 2**21, 2**23


def queue_attend(
    anchors_BD: Tensor, keys_KD: Tensor, anchor_ids_B: Tensor, key_ids_K: Tensor, log_scale: Tensor, mask: int
) -> tuple[Tensor, Tensor]:
    """(lse (B,) in float64, mean key (B, D)); see `operators`."""
    lse_B = anchors_BD.new_empty(anchors_BD.shape[0], dtype=torch.float64)
    mean_BD = anchors_BD.new_empty(anchors_BD.shape, dtype=wide_dtype(anchors_BD.dtype))
    scale = log_scale.double().exp().reshape(()) / math.log(2)
    on_cpu = anchors_BD.device.type == "cpu"
    attend, rows = (_attend_on_cpu, _CPU_ROWS) if on_cpu else (_attend_on_gpu, _GPU_ROWS)
    # Autocast would make bfloat16 logits.
    with torch.autocast(anchors_BD.device.type, enabled=False):
        for start in range(0, anchors_BD.shape[0], rows):
            part = slice(start, start + rows)
            attend((lse_B[part], mean_BD[part]), anchors_BD[part], keys_KD, anchor_ids_B[part], key_ids_K, scale, mask)
    return lse_B, mean_BD


def _chunk_width(rows: int, features: int, tile: int, chunk: int) -> int:
    return max(64, min(tile // max(1, rows), chunk // max(1, features)))


class _OnlineSoftmax:
    """Running peak, sum and weighted mean of tiles, in powers of 2."""

    def __init__(self, mean_RD: Tensor) -> None:
        column = (mean_RD.shape[0], 1)
        self.peak_R1 = mean_RD.new_full(column, -torch.inf)
        self.total_R1 = mean_RD.new_zeros(column, dtype=torch.float64)
        self.mean_RD = mean_RD.zero_()

    def raise_peak(self, peak_R1: Tensor) -> Tensor:
        """Takes a tile's peak in; returns the shift of its logits: the new peak, 0 where that is still -inf."""
        old_R1, self.peak_R1 = self.peak_R1, torch.maximum(self.peak_R1, peak_R1)
        shift_R1 = self.peak_R1.masked_fill(self.peak_R1 == -torch.inf, 0.0)
        carry_R1 = (old_R1 - shift_R1).exp2_()
        self.total_R1.mul_(carry_R1)
        self.mean_RD.mul_(carry_R1)
        return shift_R1

    def finish(self, lse_R: Tensor) -> None:
        lse_R.copy_((self.peak_R1 + self.total_R1.log2()).squeeze(1)).mul_(math.log(2))
        self.mean_RD.div_(self.total_R1.masked_fill(self.total_R1 == 0, 1.0).to(self.mean_RD.dtype))


def _attend_on_cpu(
    results: tuple[Tensor, Tensor],
    anchors_RD: Tensor,
    keys_KD: Tensor,
    anchor_ids_R: Tensor,
    key_ids_K: Tensor,
    scale: Tensor,
    mask: int,
) -> None:
    lse_R, mean_RD = results
    scaled_RD = (anchors_RD.double() * scale).to(mean_RD.dtype)
    sorted_R = anchor_ids_R.sort().values
    softmax = _OnlineSoftmax(mean_RD)
    width = _chunk_width(anchors_RD.shape[0], anchors_RD.shape[1], _CPU_TILE, _CPU_CHUNK)
    for start in range(0, keys_KD.shape[0], width):
        part = slice(start, start + width)
        keys_CD, ids_C = _counted_keys(keys_KD[part], key_ids_K[part], sorted_R, mask, mean_RD.dtype)
        if ids_C.shape[0] == 0:
            continue
        logits_RC = product(scaled_RD, keys_CD.T, "logits", room=width * scaled_RD.shape[0])
        _mask_tile(logits_RC, anchor_ids_R, ids_C, sorted_R, mask)
        shift_R1 = softmax.raise_peak(logits_RC.amax(dim=1, keepdim=True))
        weight_RC = logits_RC.sub_(shift_R1).exp2_()
        softmax.total_R1 += weight_RC.sum(dim=1, keepdim=True)
        softmax.mean_RD.addmm_(weight_RC, keys_CD)
    softmax.finish(lse_R)


def _counted_keys(
    keys_CD: Tensor, ids_C: Tensor, sorted_ids_R: Tensor, mask: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys of a chunk, widened, without those that no anchor counts; a view where that changes nothing."""
    room = keys_CD.numel()
    counted_C = ids_C != EMPTY
    if MASKS[mask] == "positives":
        counted_C &= among_sorted(ids_C, sorted_ids_R)
    if not counted_C.all():
        index_N = counted_C.nonzero().squeeze(1)
        found_ND = buffer("gathered", (index_N.shape[0], keys_CD.shape[1]), keys_CD, keys_CD.dtype, room)
        keys_CD, ids_C = torch.index_select(keys_CD, 0, index_N, out=found_ND), ids_C[index_N]
    if keys_CD.dtype != dtype:
        keys_CD = buffer("widened", tuple(keys_CD.shape), keys_CD, dtype, room).copy_(keys_CD)
    return keys_CD, ids_C


def _mask_tile(logits_RC: Tensor, ids_R: Tensor, ids_C: Tensor, sorted_ids_R: Tensor, mask: int) -> None:
    """Puts -inf where an anchor does not count a (filled) key."""
    if MASKS[mask] == "positives":
        logits_RC.masked_fill_(ids_R[:, None] != ids_C[None, :], -torch.inf)
    if MASKS[mask] != "identity":
        return
    index_N = among_sorted(ids_C, sorted_ids_R).nonzero().squeeze(1)
    if 4 * index_N.shape[0] > ids_C.shape[0]:
        logits_RC.masked_fill_(ids_R[:, None] == ids_C[None, :], -torch.inf)
    elif index_N.shape[0] > 0:
        # Few keys of a queue belong to a person of the batch: comparing the whole tile would cost 7 % of its products.
        row_P, column_P = (ids_R[:, None] == ids_C[index_N][None, :]).nonzero(as_tuple=True)
        logits_RC.index_put_((row_P, index_N[column_P]), logits_RC.new_tensor(-torch.inf))


def _attend_on_gpu(
    results: tuple[Tensor, Tensor],
    anchors_RD: Tensor,
    keys_KD: Tensor,
    anchor_ids_R: Tensor,
    key_ids_K: Tensor,
    scale: Tensor,
    mask: int,
) -> None:
    lse_R, mean_RD = results
    scale = scale.to(mean_RD.dtype)
    anchors_RD = anchors_RD.to(keys_KD.dtype) if on_tensor_cores(keys_KD) else anchors_RD.to(mean_RD.dtype)
    softmax = _OnlineSoftmax(mean_RD)
    width = _chunk_width(anchors_RD.shape[0], anchors_RD.shape[1], _GPU_TILE, _GPU_CHUNK)
    for start in range(0, keys_KD.shape[0], width):
        ids_C = key_ids_K[start : start + width]
        keys_CD = keys_KD[start : start + width].masked_fill((ids_C == EMPTY)[:, None], 0.0)
        if not on_tensor_cores(keys_CD):
            keys_CD = keys_CD.to(mean_RD.dtype)
        logits_RC = product(anchors_RD, keys_CD.T, "logits")
        logits_RC.masked_fill_(_left_out(anchor_ids_R, ids_C, mask), -torch.inf)
        shift_R1 = softmax.raise_peak(logits_RC.amax(dim=1, keepdim=True) * scale)
        # One pass for scale and shift; the scale is not in the anchors, which would round them once more.
        weight_RC = torch.addcmul(-shift_R1, logits_RC, scale, out=logits_RC).exp2_()
        softmax.total_R1 += weight_RC.sum(dim=1, keepdim=True)
        softmax.mean_RD += product(weight_RC, keys_CD, "mean")
    softmax.finish(lse_R)


def _left_out(ids_R: Tensor, ids_C: Tensor, mask: int) -> Tensor:
    """Pairs that are not counted, or a row of keys that nobody counts. Shape: (R, C) or (1, C)."""
    empty_1C = (ids_C == EMPTY)[None, :]
    if MASKS[mask] == "none":
        return empty_1C
    same_RC = ids_R[:, None] == ids_C[None, :]
    return ~same_RC if MASKS[mask] == "positives" else same_RC | empty_1C
