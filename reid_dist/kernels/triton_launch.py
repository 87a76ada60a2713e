"""Calls of the triton kernels: memory, grids, and the last sums; imported only where the backend is asked for.

What is computed stands in formulas at the head of `operators.py`. Nothing here waits for the GPU.
Shape suffixes: B rows (anchors), K keys, G columns, S splits, D features.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from reid_dist.kernels import contrastive_triton as kernels
from reid_dist.kernels.triton_tiles import (
    PROGRAMS,
    WORKSPACE_BYTES,
    Tile,
    ceil_div,
    keys_per_split,
    options,
    padded,
    splits_of,
    tile_of,
)


def queue_attend_forward(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    mask: int,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and softmax-weighted mean key of each anchor; never waits for the GPU.

    A row's result depends on that row and the keys alone, not on B.

    Args:
        anchors_BD: multiplied in the dtype of the keys. Shape: (B, D).
        keys_KD: float32 or bfloat16. Shape: (K, D).
        anchor_ids_B: int32. Shape: (B,).
        key_ids_K: int32; EMPTY slots are not read. Shape: (K,).
        log_scale: Shape: () or (1,).
        mask: position in `checks.MASKS`.
        tile: instead of the one in `triton_tiles.TILES`.
        splits: most parts of the keys, instead of what K and D give.

    Returns:
        lse, float64, -inf where nothing is counted, Shape: (B,). Mean key, float32, there zeros, Shape: (B, D).

    Raises:
        ValueError: a device, dtype or D that the kernels do not run for.
    """
    tile = tile or tile_of(keys_KD.device, keys_KD.shape[1], keys_KD.dtype)
    (rows, features), keys = anchors_BD.shape, keys_KD.shape[0]
    lse_B = torch.full((rows,), -torch.inf, dtype=torch.float64, device=keys_KD.device)
    mean_BD = torch.zeros((rows, features), dtype=torch.float32, device=keys_KD.device)
    if rows == 0 or keys == 0:
        return lse_B, mean_BD
    anchors_BD, keys_KD = anchors_BD.to(keys_KD.dtype).contiguous(), keys_KD.contiguous()
    anchor_ids_B, key_ids_K = anchor_ids_B.contiguous(), key_ids_K.contiguous()
    per_split = keys_per_split(keys, splits or splits_of(keys, features), tile.keys)
    parts = ceil_div(keys, per_split)
    chunk = max(WORKSPACE_BYTES // (4 * parts * features) // tile.rows, 1) * tile.rows
    chunk = min(chunk, ceil_div(rows, tile.rows) * tile.rows)
    sums_3SB = torch.empty((3, parts, chunk), dtype=torch.float32, device=keys_KD.device)
    part_SBD = torch.empty((parts, chunk, features), dtype=torch.float32, device=keys_KD.device)
    with _current_device(keys_KD):
        for begin in range(0, rows, chunk):
            own, count = slice(begin, begin + chunk), min(chunk, rows - begin)
            # Blocks of rows come first: programs that run together read the same keys, from memory only once.
            kernels.attend[(ceil_div(count, tile.rows), parts)](
                anchors_BD[own], keys_KD, anchor_ids_B[own], key_ids_K, log_scale, *sums_3SB, part_SBD,
                count, keys, per_split, chunk, **options(tile, features, mask, keys_KD.dtype),
            )  # fmt: skip
            kernels.combine[(ceil_div(count, 4),)](
                *sums_3SB, part_SBD, lse_B[own], mean_BD[own], count, parts, chunk,
                D=features, ROWS=4, BLOCK_D=padded(features), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return lse_B, mean_BD


def pair_statistics(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of one product matrix.

    Args:
        rows_BD: Shape: (B, D).
        columns_GD: both sides are multiplied in the narrower dtype of the two. Shape: (G, D).
        row_ids_B: int32; EMPTY rows are counted nowhere. Shape: (B,).
        column_ids_G: likewise. Shape: (G,).
        log_scale: Shape: () or (1,).
        mask: position in `checks.MASKS`.

    Returns:
        float64, -inf where nothing is counted. Shapes: (B,), (G,).

    Raises:
        ValueError: a device, dtype or D that the kernels do not run for.
    """
    rows_BD, columns_GD = _in_one_dtype(rows_BD, columns_GD)
    tile = tile_of(rows_BD.device, rows_BD.shape[1], rows_BD.dtype)
    (rows, features), columns = rows_BD.shape, columns_GD.shape[0]
    blocks, per_split, parts = _pair_grid(rows, columns, tile)
    row_2SB = torch.zeros((2, parts, rows), dtype=torch.float32, device=rows_BD.device)
    column_2SG = torch.zeros((2, blocks, columns), dtype=torch.float32, device=rows_BD.device)
    if rows > 0 and columns > 0:
        with _current_device(rows_BD):
            kernels.statistics[(blocks, parts)](
                rows_BD, columns_GD, row_ids_B.contiguous(), column_ids_G.contiguous(), log_scale, row_2SB, column_2SG,
                rows, columns, per_split, **options(tile, features, mask, rows_BD.dtype),
            )  # fmt: skip
    return _lse(row_2SB), _lse(column_2SG)


def pair_gradients(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    row_weight_B: Tensor,
    column_weight_G: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_i u_i r_i + sum_j v_j c_j, r and c of `pair_statistics`, in both sides' features.

    The first arguments are those of `pair_statistics`; r and u have shape (B,), c and v (G,).

    Returns:
        float32. Shapes: (B, D), (G, D).

    Raises:
        ValueError: a device, dtype or D that the kernels do not run for.
    """
    rows_BD, columns_GD = _in_one_dtype(rows_BD, columns_GD)
    tile = tile_of(rows_BD.device, rows_BD.shape[1], rows_BD.dtype)
    row_side = (rows_BD, row_ids_B.contiguous(), *_shift_and_weight(row_lse_B, row_weight_B))
    column_side = (columns_GD, column_ids_G.contiguous(), *_shift_and_weight(column_lse_G, column_weight_G))
    return (
        _side_gradient(row_side, column_side, log_scale, mask, tile),
        _side_gradient(column_side, row_side, log_scale, mask, tile),
    )


def _lse(sums_2SB: Tensor) -> Tensor:
    """Natural log-sum-exp over the splits, from shifts and sums to base 2."""
    shift_SB, sum_SB = sums_2SB.double()
    return torch.logsumexp(shift_SB * math.log(2) + sum_SB.log(), dim=0)


def _shift_and_weight(lse_B: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of u exp(S - lse) = w 2^(S' - x), S' to base 2: whole numbers x, which float32 holds exactly, and w."""
    none_B, lse_B = lse_B == -torch.inf, lse_B.double() / math.log(2)
    shift_B = lse_B.floor().masked_fill(none_B, 0.0)
    weight_B = (weight_B.double() * (shift_B - lse_B).exp2()).masked_fill(none_B, 0.0)
    return shift_B.float(), weight_B.float()


def _side_gradient(
    own: tuple[Tensor, ...], other: tuple[Tensor, ...], log_scale: Tensor, mask: int, tile: Tile
) -> Tensor:
    """One side's gradient. A side is its features, ids, shifts and weights."""
    (rows, features), columns = own[0].shape, other[0].shape[0]
    blocks, per_split, parts = _pair_grid(rows, columns, tile)
    pieces = 2 if own[0].dtype == torch.bfloat16 else 1
    grad_SBD = torch.zeros((parts * pieces, rows, features), dtype=torch.float32, device=own[0].device)
    if rows > 0 and columns > 0:
        with _current_device(own[0]):
            kernels.gradient[(blocks, parts * pieces)](
                *own, *other, log_scale, grad_SBD, rows, columns, per_split, pieces,
                **options(tile, features, mask, own[0].dtype),
            )  # fmt: skip
    return grad_SBD[0] if parts * pieces == 1 else grad_SBD.sum(dim=0)


def _current_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _pair_grid(rows: int, columns: int, tile: Tile) -> tuple[int, int, int]:
    """(blocks of rows, columns per split, splits): programs enough for a large GPU."""
    blocks = max(ceil_div(rows, tile.rows), 1)
    per_split = keys_per_split(columns, ceil_div(PROGRAMS, blocks), tile.keys)
    return blocks, per_split, max(ceil_div(columns, per_split), 1)


def _in_one_dtype(rows_BD: Tensor, columns_GD: Tensor) -> tuple[Tensor, Tensor]:
    dtype = min(rows_BD.dtype, columns_GD.dtype, key=lambda dtype: dtype.itemsize)
    return rows_BD.to(dtype).contiguous(), columns_GD.to(dtype).contiguous()
