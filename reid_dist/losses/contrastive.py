"""Image-text contrastive loss over the global batch.

Shape suffixes: B rows of this rank, G = world_size x B rows of all ranks, W ranks, D feature size, X masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import all_gather, all_gather_with_grad, rank, world_size
from reid_dist.kernels.contrastive import identity_means, moco_from_lse, pair_attend, supcon_from_lse


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, pid_B: Tensor | None = None) -> Tensor:
    """Symmetric softmax contrastive loss (CLIP, Radford et al. 2021); with identities, of soft multi-positive targets.

    With `pid_B` the target of row i is q_ij = 1[y_i = y_j] / sum_k 1[y_i = y_k] over the global batch, so every pair
    of one identity is a positive (the label distribution of IRRA's SDM, Jiang & Ye, CVPR 2023, with cross-entropy
    in place of the reversed KL). Without it the only positive is the own pair.

    One product of this rank's images with the texts of all ranks serves both directions: a text's log-sum-exp over the
    images is that over the ranks' parts. So only texts, and two numbers of each, are gathered with gradient.

    Args:
        image_BD: image features, need not be normalised. Shape: (B, D).
        text_BD: text features of the same pairs. Shape: (B, D).
        log_scale: natural log of the inverse temperature. Shape: () or (1,).
        pid_B: identities, int64 below 2^31. Shape: (B,).

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        return product_contrast(normalize(image_BD), normalize(text_BD), log_scale, pid_B)


def product_contrast(image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, pid_B: Tensor | None = None) -> Tensor:
    """`contrastive_loss` of features as they come, fp32 or float64, outside autocast: of products, not of cosines."""
    text_GD = all_gather_with_grad(text_BD)
    if pid_B is None:
        return _own_pairs(image_BD, text_BD, text_GD, log_scale).mean()
    return _identities(image_BD, text_GD, log_scale, pid_B.to(torch.int32)).mean()


def normalize(feature_BD: Tensor) -> Tensor:
    """Rows of length 1, in fp32: half precision moves the loss by per cents at temperature 0.01. float64 stays."""
    return F.normalize(widened(feature_BD), dim=-1)


def widened(feature_BD: Tensor) -> Tensor:
    """At least fp32."""
    return feature_BD if feature_BD.dtype == torch.float64 else feature_BD.float()


def _own_pairs(image_BD: Tensor, text_BD: Tensor, text_GD: Tensor, log_scale: Tensor) -> Tensor:
    """Half of both directions' losses of each pair. Shape: (B,)."""
    place_G = torch.arange(text_GD.shape[0], dtype=torch.int32, device=text_GD.device)
    negative_B, negative_G = pair_attend(
        image_BD, text_GD, log_scale, row_ids_B=own_rows(place_G), column_ids_G=place_G, mask="identity"
    )
    (text_negative_B,) = _own_columns(negative_G[None])
    image_to_text_B = moco_from_lse(image_BD, text_BD, negative_B, log_scale)
    return (image_to_text_B + moco_from_lse(text_BD, image_BD, text_negative_B, log_scale)) / 2


def _identities(image_BD: Tensor, text_GD: Tensor, log_scale: Tensor, pid_B: Tensor) -> Tensor:
    """The same with all pairs of one identity as positives. Shape: (B,).

    A text's mean product with its identity's images is put at the images: summed over an identity, and so over the
    global batch, sum_j t_j . mean_i v_i = sum_i v_i . mean_j t_j. Images then need no gather.
    """
    pid_G = all_gather(pid_B)
    negative_B, negative_G = pair_attend(
        image_BD, text_GD, log_scale, row_ids_B=pid_B, column_ids_G=pid_G, mask="identity"
    )
    positive_B, positive_G = pair_attend(
        image_BD, text_GD, log_scale, row_ids_B=pid_B, column_ids_G=pid_G, mask="positives"
    )
    text_negative_B, text_positive_B = _own_columns(torch.stack([negative_G, positive_G]))
    mean_BD, _ = identity_means(text_GD, pid_G, pid_B)
    image_to_text_B = supcon_from_lse(negative_B, positive_B, mean_BD, image_BD, log_scale)
    return (image_to_text_B + supcon_from_lse(text_negative_B, text_positive_B, mean_BD, image_BD, log_scale)) / 2


def _own_columns(part_XG: Tensor) -> Tensor:
    """This rank's columns of log-sum-exps over all ranks' rows, from the ranks' parts. Shape: (X, G) -> (X, B)."""
    if world_size() == 1:
        return part_XG
    part_WXB = own_rows(all_gather_with_grad(part_XG[None]).movedim(-1, 0)).movedim(0, -1)
    none_XB = (part_WXB == -torch.inf).all(dim=0)
    # Where nothing is counted on any rank the gradient of a log-sum-exp would be NaN; it is 0.
    return torch.where(none_XB, 0.0, part_WXB).logsumexp(dim=0).masked_fill(none_XB, -torch.inf)


def own_rows(x_G: Tensor) -> Tensor:
    """This rank's rows of what is in rank order. Shape: (G, ...) -> (B, ...)."""
    rows = x_G.shape[0] // world_size()
    return x_G[rank() * rows : (rank() + 1) * rows]
