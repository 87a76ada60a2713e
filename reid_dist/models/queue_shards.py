"""Attention over a queue that is cut over the ranks: anchors go to every shard, statistics and partial sums come back.

Rank w holds some of the keys. For anchor i it computes lse_wi and the softmax-weighted mean key O_wi over its own keys;
the owner of the anchor combines them in rank order:

    lse_i = logsumexp_w lse_wi        O_i = sum_w exp(lse_wi - lse_i) O_wi        d lse_i / d a_i = s O_i

so the backward needs no collective. A number per anchor would do for the loss; the gradient needs O.

Shape suffixes: B anchors of this rank, R rows of every rank's buffer, W ranks, V = W x R gathered rows, S keys here,
D feature size, U ids of a batch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reid_dist.distributed import all_to_all, start_all_gather, world_size
from reid_dist.kernels.contrastive import EMPTY, Backend, Mask, identity_means, queue_attend_with_mean


def sharded_attend(
    anchors_BD: Tensor,
    keys_SD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_S: Tensor,
    log_scale: Tensor,
    *,
    rows: int,
    mask: Mask,
    batch_ids_U: Tensor | None,
    backend: Backend,
) -> Tensor:
    """`kernels.contrastive.queue_attend` over the keys of all ranks; a collective.

    Args:
        anchors_BD: differentiable. Shape: (B, D), B <= rows; may differ between ranks.
        keys_SD: this rank's keys. Shape: (S, D); S may be 0.
        anchor_ids_B: int32. Shape: (B,).
        key_ids_S: int32. Shape: (S,).
        log_scale: differentiable, the same on every rank. Shape: () or (1,).
        rows: length of the exchanged buffers, the same on every rank.
        mask: as in `queue_attend`.
        batch_ids_U: as in `queue_attend`; the same on every rank.
        backend: of the kernel.

    Returns:
        Shape: (B,).

    Raises:
        ValueError: more anchors than rows.
    """
    with torch.no_grad():
        anchors_VD, ids_V = start_all_gather([_padded(anchors_BD, rows, 0), _padded(anchor_ids_B, rows, EMPTY)]).wait()
        lse_V, mean_VD = queue_attend_with_mean(
            anchors_VD, keys_SD, ids_V, key_ids_S, log_scale, mask=mask, batch_ids_U=batch_ids_U, backend=backend
        )
        lse_WB, mean_WBD = _exchange(lse_V, mean_VD, anchors_BD.shape[0])
        # A shard without a counted key weighs nothing, also where no shard has one (-inf - -inf).
        largest_B = lse_WB.amax(dim=0)
        weight_WB = (lse_WB - largest_B.masked_fill(largest_B == -torch.inf, 0)).double().exp()
        total_B = weight_WB.sum(dim=0)  # 0, or at least 1
        lse_B = (largest_B + total_B.log()).to(lse_WB.dtype)
        # Divided by their sum, not by exp(lse): the rounding of lse would be that of the gradient.
        mean_BD = _weighted_sum((weight_WB / total_B.clamp(min=1)).to(mean_WBD.dtype), mean_WBD)
    found: Tensor = _FromStatistics.apply(anchors_BD, log_scale, lse_B, mean_BD)
    return found


def sharded_means(keys_SD: Tensor, key_ids_S: Tensor, ids_B: Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
    """`kernels.contrastive.identity_means` over the keys of all ranks, without gradient; a collective.

    Args:
        keys_SD: this rank's keys. Shape: (S, D).
        key_ids_S: int32. Shape: (S,).
        ids_B: int32, wanted identities. Shape: (B,), B <= rows.
        rows: length of the exchanged buffers, the same on every rank.

    Returns:
        Means, Shape: (B, D); number of keys, Shape: (B,).
    """
    with torch.no_grad():
        (ids_V,) = start_all_gather([_padded(ids_B, rows, EMPTY)]).wait()
        mean_VD, count_V = identity_means(keys_SD, key_ids_S, ids_V)
        count_WB, mean_WBD = _exchange(count_V, mean_VD, ids_B.shape[0])
        count_B = count_WB.sum(dim=0)
        return _weighted_sum(count_WB / count_B.clamp(min=1), mean_WBD), count_B


class _FromStatistics(torch.autograd.Function):
    """The log-sum-exp, with the gradient that the mean key gives."""

    @staticmethod
    def forward(ctx: Any, anchors_BD: Tensor, log_scale: Tensor, lse_B: Tensor, mean_BD: Tensor) -> Tensor:
        ctx.save_for_backward(anchors_BD, log_scale, lse_B, mean_BD)
        return lse_B.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        anchors_BD, log_scale, lse_B, mean_BD = ctx.saved_tensors
        # A row that counts nothing is a constant: a caller's inf must not come back as inf * 0.
        upstream_B = gradients[0].masked_fill(lse_B == -torch.inf, 0)
        scaled_B = upstream_B * log_scale.to(mean_BD.dtype).reshape(()).exp()
        anchor_gradient_BD = scaled_B[:, None] * mean_BD
        # <a, dL/da> of all rows; they cancel, so in float64.
        scale_gradient = (anchor_gradient_BD.double() * anchors_BD.double()).sum()
        scale_gradient = scale_gradient.to(log_scale.dtype).view_as(log_scale)
        return anchor_gradient_BD.to(anchors_BD.dtype), scale_gradient, None, None


def _padded(x_B: Tensor, rows: int, value: int) -> Tensor:
    """Shape: (B, ...) -> (rows, ...)."""
    if x_B.shape[0] > rows:
        raise ValueError(f"{x_B.shape[0]} anchors, but buffers of {rows} rows")
    padded = x_B.new_full((rows, *x_B.shape[1:]), value)
    padded[: x_B.shape[0]] = x_B.detach()
    return padded


def _exchange(number_V: Tensor, mean_VD: Tensor, own_rows: int) -> tuple[Tensor, Tensor]:
    """Sends each rank the results for its own rows, in one collective.

    Returns:
        What every rank found for the rows of this one, in rank order. Shapes: (W, B), (W, B, D).
    """
    results_VX = torch.cat([number_V[:, None].to(mean_VD.dtype), mean_VD], dim=1)
    results_WRX = all_to_all(results_VX).view(world_size(), -1, results_VX.shape[1])[:, :own_rows]
    return results_WRX[..., 0], results_WRX[..., 1:]


def _weighted_sum(weight_WB: Tensor, mean_WBD: Tensor) -> Tensor:
    """Sum over ranks, in rank order. Shape: (B, D)."""
    return (weight_WB[..., None] * mean_WBD).sum(dim=0)
