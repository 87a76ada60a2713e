"""The kernels as operators of torch.library: opaque to torch.compile, with shapes and gradients of their own.

Operators take plain tensors, the mask's number (position in `checks.MASKS`) and the backend's name. In formulas, with
s = exp(log_scale), S_ij = s a_i.k_j and all sums over the pairs N that mask and ids count:

    queue_attend      lse_i = log sum_j exp(S_ij),   mean_i = sum_j exp(S_ij - lse_i) k_j
    pair_statistics   r_i = log sum_j exp(S_ij) of rows, c_j = log sum_i exp(S_ij) of columns; with `moments` also the
                      sums of p log p, of p over pairs of one id and of p over the others, p = exp(S_ij - r_i) or c_j
    pair_gradients    g_ij = sum of both sides' p (alpha + beta log p), alpha by [same id];  s sum_j g_ij k_j of rows,
                      s sum_i g_ij a_i of columns

    siglip            sum_j softplus(-z_ij (S_ij + bias)), z_ij = 1 for pairs of one id, else -1

Statistics of rows and columns are float64 (few, and differences of them are what losses are made of), what has
features float32 (float64 for float64 inputs); -inf and zeros where nothing is counted.
Shape suffixes: B rows (anchors), K keys, G columns, D features, S statistics (1 or 4), C coefficients (1 or 3).
"""

from typing import Any

import torch
from torch import Tensor

from reid_dist.kernels import chunked, chunked_pairs
from reid_dist.kernels.checks import EMPTY, wide_dtype


def _triton() -> Any:
    # Imported when it is called for: a machine without triton must import the package.
    from reid_dist.kernels import triton_launch

    return triton_launch


@torch.library.custom_op("reid_dist::queue_attend", mutates_args=())
def queue_attend(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    mask: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(lse (B,), mean key (B, D)); differentiable in anchors and log_scale, through lse only."""
    forward = _triton().queue_attend_forward if backend == "triton" else chunked.queue_attend
    lse_B, mean_BD = forward(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask)
    return lse_B.double(), mean_BD


@queue_attend.register_fake
def _(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    mask: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse_B = anchors_BD.new_empty(anchors_BD.shape[0], dtype=torch.float64)
    return lse_B, anchors_BD.new_empty(anchors_BD.shape, dtype=wide_dtype(anchors_BD.dtype))


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    lse_B, mean_BD = output
    ctx.mark_non_differentiable(mean_BD)
    ctx.save_for_backward(inputs[0], inputs[4], lse_B, mean_BD)


def _attend_backward(ctx: Any, grad_lse_B: Tensor, _grad_mean_BD: Tensor | None) -> tuple[Tensor | None, ...]:
    anchors_BD, log_scale, lse_B, mean_BD = ctx.saved_tensors
    # A row that counts nothing is a constant: a caller's inf must not come back as inf * 0.
    grad_lse_B = grad_lse_B.masked_fill(lse_B == -torch.inf, 0.0)
    weight_B = (log_scale.double().reshape(()).exp() * grad_lse_B).to(mean_BD.dtype)
    grad_BD = weight_B[:, None] * mean_BD
    grad_scale = _scale_gradient(grad_BD, anchors_BD, log_scale) if ctx.needs_input_grad[4] else None
    return grad_BD.to(anchors_BD.dtype), None, None, None, grad_scale, None, None


def _scale_gradient(grad_BD: Tensor, rows_BD: Tensor, log_scale: Tensor) -> Tensor:
    """Sum over pairs of g_ij S_ij, d/d log_scale, as sum_i <a_i, d/d a_i>; summed in float64, terms cancel."""
    return (grad_BD * rows_BD).sum(dtype=torch.float64).to(log_scale.dtype).reshape(log_scale.shape)


queue_attend.register_autograd(_attend_backward, setup_context=_save_attend)


def _narrowed(rows_BD: Tensor, columns_GD: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return (rows_BD, columns_GD) if dtype is None else (rows_BD.to(dtype), columns_GD.to(dtype))


@torch.library.custom_op("reid_dist::pair_statistics", mutates_args=())
def pair_statistics(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    moments: bool,
    backend: str,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(row statistics (S, B), column statistics (S, G)); differentiable in rows, columns and log_scale.

    `products`: a dtype that both sides were widened from, so that they can be multiplied in it.
    """
    rows_BD, columns_GD = _narrowed(rows_BD, columns_GD, products)
    arguments = (rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, mask)
    if backend == "triton":
        row_lse_B, column_lse_G = _triton().pair_statistics(*arguments)  # it has no moments
        return row_lse_B[None].double(), column_lse_G[None].double()
    return chunked_pairs.pair_statistics(*arguments, moments)


@pair_statistics.register_fake
def _(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    moments: bool,
    backend: str,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    shapes = ((4 if moments else 1, x.shape[0]) for x in (rows_BD, columns_GD))
    row_SB, column_SG = (rows_BD.new_empty(shape, dtype=torch.float64) for shape in shapes)
    return row_SB, column_SG


@torch.library.custom_op("reid_dist::pair_gradients", mutates_args=())
def pair_gradients(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    row_coefficients_CB: Tensor,
    column_coefficients_CG: Tensor,
    backend: str,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(gradient of the rows (B, D), of the columns (G, D)); coefficients: `_coefficients`."""
    rows_BD, columns_GD = _narrowed(rows_BD, columns_GD, products)
    arguments = (rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, mask)
    if backend == "triton":
        grad_rows_BD, grad_columns_GD = _triton().pair_gradients(
            *arguments, row_lse_B, column_lse_G, row_coefficients_CB[0], column_coefficients_CG[0]
        )
        return grad_rows_BD, grad_columns_GD
    return chunked_pairs.pair_gradients(
        *arguments, row_lse_B, column_lse_G, row_coefficients_CB, column_coefficients_CG
    )


@pair_gradients.register_fake
def _(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: int,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    row_coefficients_CB: Tensor,
    column_coefficients_CG: Tensor,
    backend: str,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(rows_BD.dtype)
    return rows_BD.new_empty(rows_BD.shape, dtype=wide), columns_GD.new_empty(columns_GD.shape, dtype=wide)


def _save_pairs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mask, ctx.backend, ctx.products = inputs[5], inputs[7], inputs[8]
    ctx.save_for_backward(*inputs[:5], *output)


def _pairs_backward(ctx: Any, grad_row_SB: Tensor, grad_column_SG: Tensor) -> tuple[Tensor | None, ...]:
    rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, row_SB, column_SG = ctx.saved_tensors
    grad_rows_BD, grad_columns_GD = pair_gradients(
        rows_BD,
        columns_GD,
        row_ids_B,
        column_ids_G,
        log_scale,
        ctx.mask,
        row_SB[0],
        column_SG[0],
        _coefficients(row_SB, grad_row_SB),
        _coefficients(column_SG, grad_column_SG),
        ctx.backend,
        ctx.products,
    )
    grad_scale = _pair_scale_gradient(grad_rows_BD, rows_BD, row_ids_B, log_scale)
    grads = grad_rows_BD.to(rows_BD.dtype), grad_columns_GD.to(columns_GD.dtype)
    return *grads, None, None, grad_scale, None, None, None, None


def _pair_scale_gradient(grad_BD: Tensor, rows_BD: Tensor, row_ids_B: Tensor, log_scale: Tensor) -> Tensor:
    # Empty rows have no gradient, but 0 * NaN is what they may hold.
    return _scale_gradient(grad_BD, rows_BD.masked_fill((row_ids_B == EMPTY)[:, None], 0.0), log_scale)


def _coefficients(statistics_SB: Tensor, grad_SB: Tensor) -> Tensor:
    """(alpha of pairs of different ids, beta, alpha of pairs of one id) from the gradients of the statistics.

    d lse / d S = p, d (sum p log p) / d S = p (log p - entropy), d positive / d S = p ([same] - positive) and likewise
    for negative. With positive + negative = 1, each alpha multiplies the mass of the OTHER kind: `1 - positive` and an
    added gamma [same] would cancel where nearly all mass is on one kind.
    """
    # As in the queue's backward: rows that count nothing are constants.
    grad_SB = grad_SB.masked_fill(statistics_SB[0] == -torch.inf, 0.0)
    if statistics_SB.shape[0] == 1:
        return grad_SB
    _, entropy_B, positive_B, negative_B = statistics_SB
    by_lse_B, by_entropy_B, by_positive_B, by_negative_B = grad_SB
    base_B = by_lse_B - by_entropy_B * entropy_B
    difference_B = by_positive_B - by_negative_B
    return torch.stack([base_B - difference_B * positive_B, by_entropy_B, base_B + difference_B * negative_B])


pair_statistics.register_autograd(_pairs_backward, setup_context=_save_pairs)


@torch.library.custom_op("reid_dist::siglip", mutates_args=())
def siglip(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor, bias: Tensor
) -> Tensor:
    """Loss of each row (B,); differentiable in rows, columns, log_scale and bias."""
    return chunked_pairs.siglip_loss(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, bias)


@siglip.register_fake
def _(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor, bias: Tensor
) -> Tensor:
    return rows_BD.new_empty(rows_BD.shape[0], dtype=torch.float64)


@torch.library.custom_op("reid_dist::siglip_gradients", mutates_args=())
def siglip_gradients(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_i weight_i loss_i: rows (B, D), columns (G, D), bias () in float64."""
    arguments = (rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, bias)
    return chunked_pairs.siglip_gradients(*arguments, weight_B)


@siglip_gradients.register_fake
def _(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(rows_BD.dtype)
    grad_rows_BD, grad_columns_GD = (x.new_empty(x.shape, dtype=wide) for x in (rows_BD, columns_GD))
    return grad_rows_BD, grad_columns_GD, rows_BD.new_empty((), dtype=torch.float64)


def _save_siglip(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _siglip_backward(ctx: Any, grad_loss_B: Tensor) -> tuple[Tensor | None, ...]:
    rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, bias = ctx.saved_tensors
    grad_rows_BD, grad_columns_GD, grad_bias = siglip_gradients(
        rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, bias, grad_loss_B
    )
    grad_scale = _pair_scale_gradient(grad_rows_BD, rows_BD, row_ids_B, log_scale)
    grads = grad_rows_BD.to(rows_BD.dtype), grad_columns_GD.to(columns_GD.dtype)
    return *grads, None, None, grad_scale, grad_bias.to(bias.dtype).reshape(bias.shape)


siglip.register_autograd(_siglip_backward, setup_context=_save_siglip)
