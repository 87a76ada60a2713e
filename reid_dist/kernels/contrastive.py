"""Contrastive losses over a queue of keys, and their parts; every public function of the kernels is imported from here.

One pass over the keys gives the loss AND its gradient (kernel.md section 1): with s = exp(log_scale) and p the softmax
of anchor i over the keys that its mask counts,

    lse_i = log sum_j exp(s a_i.k_j)        O_i = sum_j p_ij k_j        d lse_i / d a_i = s O_i

so the forward saves O (B, D), the backward is O(B D), and keys are constants.
Backends: `reference`, `chunked`, `triton`.
Shape suffixes: B anchors, K keys, D features, U ids of a batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels import operators, reference
from reid_dist.kernels.checks import (
    EMPTY,
    RANDOM,
    Backend,
    Mask,
    check_features,
    check_ids,
    check_scale,
    mask_number,
    wide_dtype,
    widen,
)
from reid_dist.kernels.identity import among, identity_counts, identity_means
from reid_dist.kernels.pairs import (
    clip_contrastive,
    pair_attend,
    pair_moments,
    sdm,
    sdm_from_moments,
    siglip,
    supcon_from_lse,
)
from reid_dist.kernels.reference import row_products
from reid_dist.kernels.routing import choose, explain

__all__ = [
    "EMPTY",
    "RANDOM",
    "Backend",
    "Mask",
    "clip_contrastive",
    "explain",
    "identity_counts",
    "identity_means",
    "moco_from_lse",
    "moco_nce",
    "pair_attend",
    "pair_moments",
    "queue_attend",
    "queue_attend_with_mean",
    "sdm",
    "sdm_from_moments",
    "siglip",
    "supcon_from_lse",
    "supcon_queue",
]


def queue_attend(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    *,
    mask: Mask = "identity",
    batch_ids_U: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Log-sum-exp of each anchor's scaled products with the keys that its mask counts.

    Differentiable in the anchors and in `log_scale`; keys are constants. Neither side need be normalised. Products,
    exponentials and sums are float32 (float64 for float64 inputs) whatever the inputs are. Where keys are bfloat16, a
    GPU multiplies in bfloat16 and sums in float32: wider anchors are rounded to the keys' dtype for the product.

    Args:
        anchors_BD: Shape: (B, D).
        keys_KD: not differentiable. Shape: (K, D); K may be 0.
        anchor_ids_B: int32, >= 0. Shape: (B,).
        key_ids_K: int32; EMPTY (-1): never counted, whatever the slot holds; RANDOM (-2): counted, equal to nobody.
            Shape: (K,).
        log_scale: natural log of the inverse temperature. Shape: () or (1,).
        mask: "identity" leaves out keys of the anchor's own id, "none" counts all, "positives" only the own id.
        batch_ids_U: with it, keys whose id is among these are left out for ALL anchors (the mask of the published
            TextReID loss); only with mask "none". int32. Shape: (U,).
        backend: "auto" takes what `explain` says.

    Returns:
        -inf with gradient 0 where nothing is counted; NaN where a counted value is NaN. Shape: (B,).

    Raises:
        ValueError: shapes that do not fit, keys that want a gradient (see `pair_attend`), an unusable backend.
        TypeError: dtypes that do not fit.
    """
    key_ids_K = _checked(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask, batch_ids_U)
    lse_B, _ = _attend(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask, backend)
    return lse_B.to(wide_dtype(anchors_BD.dtype))


def queue_attend_with_mean(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    *,
    mask: Mask = "identity",
    batch_ids_U: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`queue_attend` without autograd, with the softmax-weighted mean key (O above) of which a gradient is made.

    Parts of a split queue combine as lse = logsumexp_r lse_r and O = sum_r exp(lse_r - lse) O_r.

    Returns:
        lse, Shape: (B,). Mean key, zeros where nothing is counted, at least float32, Shape: (B, D).
    """
    key_ids_K = _checked(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask, batch_ids_U)
    with torch.no_grad():
        lse_B, mean_BD = _attend(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask, backend)
    return lse_B.to(mean_BD.dtype), mean_BD


def _checked(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    mask: Mask,
    batch_ids_U: Tensor | None,
) -> Tensor:
    """Checks a call; returns the key ids with the batch's union masked out."""
    check_features(anchors=anchors_BD, keys=keys_KD)
    check_ids("anchor_ids", anchor_ids_B, anchors_BD.shape[0])
    check_ids("key_ids", key_ids_K, keys_KD.shape[0])
    check_scale("log_scale", log_scale)
    if keys_KD.requires_grad:
        raise ValueError("keys want a gradient, but a queue's keys are constants; detach them or use pair_attend")
    if batch_ids_U is None:
        return key_ids_K
    check_ids("batch_ids", batch_ids_U, batch_ids_U.numel())
    if mask != "none":
        raise ValueError(f"batch_ids are a mask of their own; use them with mask='none', not {mask!r}")
    return key_ids_K.masked_fill(among(key_ids_K, batch_ids_U), EMPTY)


def _attend(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    mask: Mask,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """(lse in float64, since losses take differences of it; mean key)."""
    name = choose(backend, "queue_attend", anchors_BD, keys_KD)
    arguments = (anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask_number(mask))
    if name != "reference":
        lse_B, mean_BD = operators.queue_attend(*arguments, name)
        return lse_B, mean_BD
    with torch.autocast(anchors_BD.device.type, enabled=False):
        return reference.queue_attend(*arguments)


def moco_nce(
    anchors_BD: Tensor,
    positives_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    *,
    mask: Mask = "identity",
    batch_ids_U: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE of one positive key against a queue (MoCo, He et al. 2020, eq. 1), row by row.

    loss_i = -log [ exp(s a_i.k+_i) / (exp(s a_i.k+_i) + sum_j exp(s a_i.k_j)) ], j over the counted keys.
    With mask="none" and `batch_ids_U` it is the published TextReID loss of one direction (Han et al., BMVC 2021).

    Args:
        anchors_BD: Shape: (B, D).
        positives_BD: the anchors' own keys, constants. Shape: (B, D).
        keys_KD: constants. Shape: (K, D).
        anchor_ids_B: int32, >= 0. Shape: (B,).
        key_ids_K: int32, as in `queue_attend`. Shape: (K,).
        log_scale: Shape: () or (1,).
        mask: as in `queue_attend`.
        batch_ids_U: as in `queue_attend`.
        backend: as in `queue_attend`.

    Returns:
        0 where no key is counted. Shape: (B,); callers take the mean.

    Raises:
        ValueError, TypeError: as in `queue_attend`; positives that want a gradient.
    """
    check_features(anchors=anchors_BD, positives=positives_BD)
    if positives_BD.requires_grad:
        raise ValueError("positives want a gradient, but they are constants here; detach them or use clip_contrastive")
    # Widened once: the two halves of the gradient, s sigma (O - k+), cancel and must meet before they are rounded.
    anchors_BD = widen(anchors_BD)
    key_ids_K = _checked(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask, batch_ids_U)
    lse_B, _ = _attend(anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask, backend)
    return moco_from_lse(anchors_BD, positives_BD, lse_B, log_scale)


def moco_from_lse(anchors_BD: Tensor, positives_BD: Tensor, lse_B: Tensor, log_scale: Tensor) -> Tensor:
    """The last line of `moco_nce`, for a log-sum-exp that comes from a queue: softplus(lse - s a.k+).

    Never log-sum-exp over both minus the positive: that cancels where the positive is easy (loss error 50 % at
    temperature 0.02). Give the anchors in float32, so that the gradients of lse and of this meet unrounded.

    Args:
        anchors_BD: Shape: (B, D).
        positives_BD: Shape: (B, D).
        lse_B: over the negatives only. Shape: (B,).
        log_scale: Shape: () or (1,).

    Returns:
        At least float32. Shape: (B,).
    """
    gap_B = lse_B.double() - row_products(anchors_BD, positives_BD, log_scale)
    return F.softplus(gap_B, threshold=40.0).to(wide_dtype(anchors_BD.dtype))


def supcon_queue(
    anchors_BD: Tensor,
    keys_KD: Tensor,
    anchor_ids_B: Tensor,
    key_ids_K: Tensor,
    log_scale: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Supervised contrastive loss over a queue, all keys of the anchor's identity positive, row by row.

    L_i = -1/|P(i)| sum_{p in P(i)} log [ exp(s a_i.k_p) / sum_j exp(s a_i.k_j) ], j over all filled slots (Khosla et
    al. 2020, eq. 2, "out").

    Args:
        anchors_BD: Shape: (B, D).
        keys_KD: constants. Shape: (K, D).
        anchor_ids_B: int32, >= 0. Shape: (B,).
        key_ids_K: int32, as in `queue_attend`. Shape: (K,).
        log_scale: Shape: () or (1,).
        backend: as in `queue_attend`.

    Returns:
        0 for rows without a positive key. Shape: (B,); callers take the mean.
    """
    anchors_BD = widen(anchors_BD)
    arguments = (anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale)
    _checked(*arguments, "identity", None)
    negative_lse_B, _ = _attend(*arguments, "identity", backend)
    positive_lse_B, _ = _attend(*arguments, "positives", backend)
    positive_mean_BD, _ = identity_means(keys_KD, key_ids_K, anchor_ids_B)
    return supcon_from_lse(negative_lse_B, positive_lse_B, positive_mean_BD, anchors_BD, log_scale)
