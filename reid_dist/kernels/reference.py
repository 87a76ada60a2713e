"""The plain form of every operation: full logits, differentiated by autograd, in float64 for float64 inputs.

It is the oracle of the other backends and what runs for small sizes. Logits are at least float32.
Shape suffixes: B rows (anchors), K keys, G columns, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels.checks import EMPTY, MASKS, widen


def counted(row_ids_B: Tensor, column_ids_K: Tensor, mask: int) -> Tensor:
    """Which pairs enter the sums. Shape: (B, K)."""
    filled_BK = (column_ids_K != EMPTY)[None, :] & (row_ids_B != EMPTY)[:, None]
    if MASKS[mask] == "none":
        return filled_BK
    same_BK = row_ids_B[:, None] == column_ids_K[None, :]
    return filled_BK & (same_BK if MASKS[mask] == "positives" else ~same_BK)


def row_products(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
    """exp(log_scale) x_i.y_i, summed and scaled in float64: it adds no error to speak of. Shape: (B,)."""
    return log_scale.double().reshape(()).exp() * (widen(x_BD) * widen(y_BD)).sum(dim=1, dtype=torch.float64)


def filled_rows(x_KD: Tensor, ids_K: Tensor) -> Tensor:
    """At least float32, with zeros in empty slots: whatever they hold, 0 * NaN must not reach a sum."""
    return widen(x_KD).masked_fill((ids_K == EMPTY)[:, None], 0.0)


def scaled(x_BD: Tensor, log_scale: Tensor) -> Tensor:
    """exp(log_scale) x, at least float32, rounded once; the scale's gradient is summed in float64. Shape: (B, D)."""
    x_BD = widen(x_BD)
    return (log_scale.double().reshape(()).exp() * x_BD.double()).to(x_BD.dtype)


def shifted(logits_BK: Tensor, counted_BK: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits - peak, peak, sum of exp(logits - peak) in float64), with -inf and 0 where nothing is counted.

    Softmax and log-sum-exp are built from these and not from a rounded log-sum-exp: at temperature 0.01 that would
    move every weight by 4e-6.
    """
    masked_BK = logits_BK.masked_fill(~counted_BK, -torch.inf)
    # amax refuses to reduce nothing.
    peak_B = (masked_BK.amax(dim=dim) if logits_BK.shape[dim] else masked_BK.sum(dim=dim)).detach()
    peak_B = peak_B.masked_fill(peak_B == -torch.inf, 0.0)
    gap_BK = masked_BK - peak_B.unsqueeze(dim)
    return gap_BK, peak_B, gap_BK.exp().sum(dim=dim, dtype=torch.float64)


def masked_lse(logits_BK: Tensor, counted_BK: Tensor, dim: int) -> Tensor:
    """log-sum-exp of the counted entries in float64; -inf with gradient 0 (not NaN) where nothing is counted."""
    _, peak_B, total_B = shifted(logits_BK, counted_BK, dim)
    none_B = total_B == 0
    return (peak_B + total_B.masked_fill(none_B, 1.0).log()).masked_fill(none_B, -torch.inf)


def queue_attend(
    anchors_BD: Tensor, keys_KD: Tensor, anchor_ids_B: Tensor, key_ids_K: Tensor, log_scale: Tensor, mask: int
) -> tuple[Tensor, Tensor]:
    """(lse_B, mean key of the softmax (B, D)); see `contrastive.queue_attend`."""
    keys_KD = filled_rows(keys_KD, key_ids_K)
    logits_BK = scaled(anchors_BD, log_scale) @ keys_KD.T
    counted_BK = counted(anchor_ids_B, key_ids_K, mask)
    with torch.no_grad():
        gap_BK, _, total_B = shifted(logits_BK, counted_BK, dim=1)
        mean_BD = (gap_BK.exp() @ keys_KD) / total_B.masked_fill(total_B == 0, 1.0).to(keys_KD.dtype)[:, None]
    return masked_lse(logits_BK, counted_BK, dim=1), mean_BD


def pair_logits(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor
) -> Tensor:
    """Scaled products of all pairs, 0 where either side is empty. Shape: (B, G)."""
    rows_BD, columns_GD = filled_rows(rows_BD, row_ids_B), filled_rows(columns_GD, column_ids_G)
    return scaled(rows_BD, log_scale) @ columns_GD.T


def pair_attend(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor, mask: int
) -> tuple[Tensor, Tensor]:
    """(row lse (B,), column lse (G,)); see `pairs.pair_attend`."""
    logits_BG = pair_logits(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale)
    counted_BG = counted(row_ids_B, column_ids_G, mask)
    return masked_lse(logits_BG, counted_BG, dim=1), masked_lse(logits_BG, counted_BG, dim=0)


def softmax_moments(logits_BG: Tensor, counted_BG: Tensor, same_BG: Tensor, dim: int) -> Tensor:
    """Log-sum-exp over `dim`; sums of p log p, of p at pairs of one identity, of p at the others. Shape: (4, rows)."""
    gap_BG, peak_B, total_B = shifted(logits_BG, counted_BG, dim)
    none_B = total_B == 0
    log_total_B = total_B.masked_fill(none_B, 1.0).log()
    log_p_BG = gap_BG.masked_fill(~counted_BG, 0.0) - log_total_B.to(logits_BG.dtype).unsqueeze(dim)
    p_BG = log_p_BG.exp() * counted_BG
    parts = (p_BG * log_p_BG, p_BG * same_BG, p_BG * ~same_BG)
    lse_B = (peak_B + log_total_B).masked_fill(none_B, -torch.inf)
    return torch.stack([lse_B, *(part.sum(dim=dim, dtype=torch.float64) for part in parts)])


def pair_moments(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(row moments (4, B), column moments (4, G)) of `softmax_moments`, every filled pair counted."""
    logits_BG = pair_logits(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale)
    counted_BG = counted(row_ids_B, column_ids_G, MASKS.index("none"))
    same_BG = row_ids_B[:, None] == column_ids_G[None, :]
    return (
        softmax_moments(logits_BG, counted_BG, same_BG, dim=1),
        softmax_moments(logits_BG, counted_BG, same_BG, dim=0),
    )


def siglip(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor, bias: Tensor
) -> Tensor:
    """Sigmoid loss of each row, summed over columns; see `pairs.siglip`. Shape: (B,)."""
    logits_BG = pair_logits(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale) + bias.reshape(())
    same_BG = row_ids_B[:, None] == column_ids_G[None, :]
    loss_BG = F.softplus(torch.where(same_BG, -logits_BG, logits_BG), threshold=40.0)
    return loss_BG.masked_fill(~counted(row_ids_B, column_ids_G, MASKS.index("none")), 0.0).sum(
        dim=1, dtype=torch.float64
    )
