"""Similarity distribution matching over the global batch.

Shape suffixes: B rows of this rank, G = world_size x B rows of all ranks, W ranks, D feature size; 4 moments.
"""

import torch
from torch import Tensor

from reid_dist.distributed import all_gather, all_gather_with_grad, world_size
from reid_dist.kernels.contrastive import identity_counts, pair_moments, sdm_from_moments
from reid_dist.losses.contrastive import normalize, own_rows


def sdm_loss(image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, pid_B: Tensor, epsilon: float = 1e-8) -> Tensor:
    """KL divergence of the similarities' softmax from the identities' distribution (IRRA, Jiang & Ye, CVPR 2023).

    Per anchor sum_j p_ij (log p_ij - log(q_ij + epsilon)) with p_ij = softmax_j(exp(log_scale) cos_ij) and
    q_ij = 1[y_i = y_j] / sum_k 1[y_i = y_k], j over the global batch; the means of both directions are added.

    As in `contrastive_loss`, one product of this rank's images with all texts serves both directions: texts, and four
    numbers of each, are gathered with gradient.

    Args:
        image_BD: image features, need not be normalised. Shape: (B, D); B may be 0, on all ranks alike.
        text_BD: text features of the same pairs. Shape: (B, D).
        log_scale: natural log of the inverse temperature (published: log 50). Shape: () or (1,).
        pid_B: identities, int64 below 2^31. Shape: (B,).
        epsilon: keeps log q finite on other identities.

    Returns:
        Scalar, 0 without rows; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = normalize(image_BD), normalize(text_BD)
        text_GD = all_gather_with_grad(text_BD)
        pid_B = pid_B.to(torch.int32)
        pid_G = all_gather(pid_B)
        image_4B, text_4G = pair_moments(image_BD, text_GD, pid_B, pid_G, log_scale)
        count_B = identity_counts(pid_G, pid_B)
        loss_B = sdm_from_moments(image_4B, count_B, epsilon) + sdm_from_moments(
            _own_columns(text_4G), count_B, epsilon
        )
        return loss_B.sum().to(image_BD.dtype) / max(1, loss_B.shape[0])


def _own_columns(part_4G: Tensor) -> Tensor:
    """This rank's columns of the moments over all ranks' rows, from the ranks' parts. Shape: (4, G) -> (4, B)."""
    if world_size() == 1:
        return part_4G
    part_4BW = own_rows(all_gather_with_grad(part_4G[None]).permute(2, 1, 0)).transpose(0, 1)
    lse_BW, entropy_BW, positive_BW, negative_BW = part_4BW
    lse_B = lse_BW.logsumexp(dim=1)
    log_share_BW = lse_BW - lse_B[:, None]
    share_BW = log_share_BW.exp()
    means = ((share_BW * x_BW).sum(dim=1) for x_BW in (entropy_BW + log_share_BW, positive_BW, negative_BW))
    return torch.stack([lse_B, *means])
