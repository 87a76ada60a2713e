"""In-batch contrastive losses: both sides and the scale trainable.

Shape suffixes: B rows of this rank, G columns (the rows of all ranks, or of this one), D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels import operators, reference
from reid_dist.kernels.checks import (
    EMPTY,
    Backend,
    Mask,
    check_features,
    check_ids,
    check_scale,
    mask_number,
    wide_dtype,
    widen,
)
from reid_dist.kernels.identity import identity_counts, identity_means
from reid_dist.kernels.reference import row_products
from reid_dist.kernels.routing import choose


def pair_attend(
    rows_BD: Tensor,
    columns_GD: Tensor,
    log_scale: Tensor,
    *,
    row_ids_B: Tensor | None = None,
    column_ids_G: Tensor | None = None,
    mask: Mask = "identity",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row's and of every column's scaled products, of one product matrix.

    Differentiable in rows, columns and `log_scale`. Where the rows are one rank's, the column values cover only these:
    combine the ranks' parts with a logsumexp over ranks.

    Args:
        rows_BD: Shape: (B, D).
        columns_GD: Shape: (G, D).
        log_scale: natural log of the inverse temperature. Shape: () or (1,).
        row_ids_B: int32; EMPTY rows (padding) are counted nowhere. None: every pair is counted. Shape: (B,).
        column_ids_G: with `row_ids_B` or not at all. Shape: (G,).
        mask: with ids: "identity" leaves out pairs of one id (so that a positive can be added in the softplus form:
            see `contrastive.moco_from_lse`), "positives" counts only these, "none" all.
        backend: "auto" takes what `explain` says.

    Returns:
        Row lse, Shape: (B,), and column lse, Shape: (G,); -inf with gradient 0 where nothing is counted.

    Raises:
        ValueError: shapes that do not fit, ids of one side only, an unusable backend.
        TypeError: dtypes that do not fit.
    """
    row_ids_B, column_ids_G, mask = _pair_ids(rows_BD, columns_GD, row_ids_B, column_ids_G, mask)
    row_lse_B, column_lse_G = _attend(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, mask, backend)
    wide = wide_dtype(rows_BD.dtype)
    return row_lse_B.to(wide), column_lse_G.to(wide)


def _attend(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    mask: Mask,
    backend: Backend,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`pair_attend` in float64: losses take differences of lse. `products`: the dtype that sides were widened from."""
    _check_pairs(rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale)
    name = choose(backend, "pair_attend", rows_BD, columns_GD, products)
    arguments = (rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale, mask_number(mask))
    if name != "reference":
        row_1B, column_1G = operators.pair_statistics(*arguments, False, name, products)
        return row_1B[0], column_1G[0]
    with torch.autocast(rows_BD.device.type, enabled=False):
        return reference.pair_attend(*arguments)


def _pair_ids(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor | None, column_ids_G: Tensor | None, mask: Mask
) -> tuple[Tensor, Tensor, Mask]:
    if row_ids_B is not None and column_ids_G is not None:
        return row_ids_B, column_ids_G, mask
    if row_ids_B is not None or column_ids_G is not None:
        raise ValueError("ids are given for one side only; give row_ids and column_ids, or neither")
    row_ids_B = torch.zeros(rows_BD.shape[0], dtype=torch.int32, device=rows_BD.device)
    return row_ids_B, torch.zeros(columns_GD.shape[0], dtype=torch.int32, device=columns_GD.device), "none"


def _check_pairs(
    rows_BD: Tensor, columns_GD: Tensor, row_ids_B: Tensor, column_ids_G: Tensor, log_scale: Tensor
) -> None:
    check_features(rows=rows_BD, columns=columns_GD)
    check_ids("row_ids", row_ids_B, rows_BD.shape[0])
    check_ids("column_ids", column_ids_G, columns_GD.shape[0])
    check_scale("log_scale", log_scale)


def clip_contrastive(
    image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, ids_B: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Symmetric softmax loss of a batch (CLIP, Radford et al. 2021), row by row; one process.

    Without ids the own pair is the positive and every other a negative. With ids every pair of one identity is a
    positive: cross-entropy to q_ij = 1[y_i = y_j] / sum_k 1[y_i = y_k]. Both in the softplus form, over the negatives.

    Args:
        image_BD: Shape: (B, D).
        text_BD: texts of the same pairs. Shape: (B, D).
        log_scale: Shape: () or (1,).
        ids_B: int32, >= 0. Shape: (B,).
        backend: as in `pair_attend`.

    Returns:
        Half of both directions' losses of each pair. Shape: (B,); callers take the mean.
    """
    check_features(images=image_BD, texts=text_BD)
    # Widened once: the parts of a gradient cancel and must meet before they are rounded. Products stay narrow.
    products = image_BD.dtype if image_BD.dtype == text_BD.dtype else None
    image_BD, text_BD = widen(image_BD), widen(text_BD)
    own_B = torch.arange(image_BD.shape[0], dtype=torch.int32, device=image_BD.device) if ids_B is None else ids_B
    arguments = (image_BD, text_BD, own_B, own_B, log_scale)
    negative_B, negative_G = _attend(*arguments, "identity", backend, products)
    if ids_B is None:
        positive_B = row_products(image_BD, text_BD, log_scale)
        gaps = (negative_B.double() - positive_B, negative_G.double() - positive_B)
        image_loss_B, text_loss_B = (F.softplus(gap_B, threshold=40.0) for gap_B in gaps)
        return ((image_loss_B + text_loss_B) / 2).to(image_BD.dtype)
    positive_B, positive_G = _attend(*arguments, "positives", backend, products)
    image_loss_B = supcon_from_lse(
        negative_B, positive_B, identity_means(text_BD, ids_B, ids_B)[0], image_BD, log_scale
    )
    text_loss_B = supcon_from_lse(negative_G, positive_G, identity_means(image_BD, ids_B, ids_B)[0], text_BD, log_scale)
    return (image_loss_B + text_loss_B) / 2


def supcon_from_lse(
    negative_lse_B: Tensor, positive_lse_B: Tensor, positive_mean_BD: Tensor, anchors_BD: Tensor, log_scale: Tensor
) -> Tensor:
    """The last line of `supcon_queue`: softplus(negative - positive) + (positive - s a.mean).

    Args:
        negative_lse_B: over the keys of other identities. Shape: (B,).
        positive_lse_B: over the keys of the anchor's; -inf where there is none: loss 0, gradient 0. Shape: (B,).
        positive_mean_BD: mean of the keys of the anchor's identity. Shape: (B, D).
        anchors_BD: Shape: (B, D).
        log_scale: Shape: () or (1,).

    Returns:
        At least float32. Shape: (B,).
    """
    none_B = positive_lse_B == -torch.inf
    positive_B = positive_lse_B.double().masked_fill(none_B, 0.0)
    spread_B = positive_B - row_products(anchors_BD, positive_mean_BD, log_scale)
    loss_B = F.softplus(negative_lse_B.double() - positive_B, threshold=40.0) + spread_B
    return loss_B.masked_fill(none_B, 0.0).to(wide_dtype(anchors_BD.dtype))


def sdm(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    epsilon: float = 1e-8,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Similarity distribution matching (IRRA, Jiang & Ye, CVPR 2023): KL(p || q + epsilon), both directions added.

    p is the softmax of a row (column), q_ij = 1[y_i = y_j] / sum_k 1[y_i = y_k]. One process: the columns' direction
    covers the rows that it is given.

    Args:
        rows_BD: Shape: (B, D).
        columns_GD: Shape: (G, D).
        row_ids_B: int32; EMPTY rows are counted nowhere. Shape: (B,).
        column_ids_G: likewise. Shape: (G,).
        log_scale: Shape: () or (1,).
        epsilon: keeps log q finite on other identities.
        backend: as in `pair_attend`; there is no triton kernel.

    Returns:
        Mean over rows plus mean over columns, scalar.
    """
    arguments = (rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale)
    row_4B, column_4G = pair_moments(*arguments, backend=backend)
    loss = _filled_mean(sdm_from_moments(row_4B, identity_counts(column_ids_G, row_ids_B), epsilon), row_ids_B)
    of_columns_G = sdm_from_moments(column_4G, identity_counts(row_ids_B, column_ids_G), epsilon)
    return (loss + _filled_mean(of_columns_G, column_ids_G)).to(wide_dtype(rows_BD.dtype))


def pair_moments(
    rows_BD: Tensor,
    columns_GD: Tensor,
    row_ids_B: Tensor,
    column_ids_G: Tensor,
    log_scale: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """What `sdm` sees of every row's and of every column's softmax p, of one product matrix.

    Differentiable in rows, columns and `log_scale`. Where the rows are one rank's, the column values cover only these:
    with w_r = exp(lse_r - logsumexp_r lse_r), the sums over all rows are sum_r w_r (sum p log p + log w_r), and
    sum_r w_r of the other two.

    Args:
        rows_BD: Shape: (B, D).
        columns_GD: Shape: (G, D).
        row_ids_B: int32; EMPTY rows are counted nowhere. Shape: (B,).
        column_ids_G: likewise. Shape: (G,).
        log_scale: Shape: () or (1,).
        backend: as in `pair_attend`; there is no triton kernel.

    Returns:
        Log-sum-exp, sum of p log p, of p over the pairs of one id, of p over the others; -inf and zeros where nothing
        is counted. float64. Shapes: (4, B), (4, G).
    """
    arguments = (rows_BD, columns_GD, row_ids_B, column_ids_G, log_scale)
    _check_pairs(*arguments)
    name = choose(backend, "sdm", rows_BD, columns_GD)
    if name != "reference":
        row_4B, column_4G = operators.pair_statistics(*arguments, mask_number("none"), True, name)
        return row_4B, column_4G
    with torch.autocast(rows_BD.device.type, enabled=False):
        return reference.pair_moments(*arguments)


def sdm_from_moments(moments_4B: Tensor, count_B: Tensor, epsilon: float = 1e-8) -> Tensor:
    """One direction of `sdm` row by row: sum_j p log p - sum_j p log(q + epsilon).

    Args:
        moments_4B: of `pair_moments`. Shape: (4, B).
        count_B: how many columns are of the row's identity. Shape: (B,).
        epsilon: as in `sdm`.

    Returns:
        float64. Shape: (B,).
    """
    _, entropy_B, positive_B, negative_B = moments_4B
    log_q_B = (1 / count_B.double().clamp(min=1) + epsilon).log()
    loss_B: Tensor = entropy_B - positive_B * log_q_B - negative_B * math.log(epsilon)
    return loss_B


def _filled_mean(loss_B: Tensor, ids_B: Tensor) -> Tensor:
    filled_B = ids_B != EMPTY
    return loss_B.masked_fill(~filled_B, 0.0).sum() / filled_B.sum().clamp(min=1)


def siglip(
    image_BD: Tensor,
    text_GD: Tensor,
    image_ids_B: Tensor,
    text_ids_G: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Sigmoid loss (SigLIP, Zhai et al. 2023, eq. 1), row by row: sum_j softplus(-z_ij (s a_i.c_j + bias)).

    z_ij = 1 for pairs of one id, else -1; give every pair an id of its own for the published loss. Differentiable in
    both sides, `log_scale` and `bias`.

    Args:
        image_BD: Shape: (B, D).
        text_GD: Shape: (G, D).
        image_ids_B: int32; EMPTY rows are counted nowhere. Shape: (B,).
        text_ids_G: likewise. Shape: (G,).
        log_scale: Shape: () or (1,).
        bias: added to every logit. Shape: () or (1,).
        backend: as in `pair_attend`; there is no triton kernel.

    Returns:
        Sum over the columns. Shape: (B,); callers take the mean.
    """
    _check_pairs(image_BD, text_GD, image_ids_B, text_ids_G, log_scale)
    check_scale("bias", bias)
    arguments = (image_BD, text_GD, image_ids_B, text_ids_G, log_scale, bias)
    if choose(backend, "siglip", image_BD, text_GD) != "reference":
        loss_B: Tensor = operators.siglip(*arguments)
        return loss_B.to(wide_dtype(image_BD.dtype))
    with torch.autocast(image_BD.device.type, enabled=False):
        return reference.siglip(*arguments).to(wide_dtype(image_BD.dtype))
