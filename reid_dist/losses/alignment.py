"""Alignment loss over all cross-modal pairs of the global batch.

Shape suffixes: B rows of this rank, G rows of all ranks, D feature size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import all_gather, all_gather_with_grad
from reid_dist.losses.contrastive import normalize


def alignment_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    pid_B: Tensor,
    positive_bound: float = 0.6,
    negative_bound: float = 0.4,
    positive_scale: float = 10.0,
    negative_scale: float = 40.0,
) -> Tensor:
    """Cosines of one identity above a bound, of two below another (ViTAA, Wang et al., ECCV 2020; TextReID, 2021).

    (2 / G) { sum over pairs of one identity of log(1 + exp(-positive_scale (S_ij - positive_bound)))
            + sum over the other pairs       of log(1 + exp(negative_scale (S_ij - negative_bound))) }
    over the G x G image-text pairs of the global batch; 2 stands for the two retrieval directions, whose sums are
    equal. A pair is of one identity by its label, not only on the diagonal. Because it is a sum over pairs divided by
    rows, it grows with the batch: the published weight 1 belongs to G = 128.

    Args:
        image_BD: image features, need not be normalised. Shape: (B, D); B may be 0, on all ranks alike.
        text_BD: text features of the same pairs. Shape: (B, D).
        pid_B: identities. Shape: (B,).
        positive_bound: alpha of the paper, a cosine.
        negative_bound: beta of the paper.
        positive_scale: steepness at positives.
        negative_scale: steepness at negatives.

    Returns:
        Scalar, 0 without rows; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        cosine_BG = normalize(image_BD) @ all_gather_with_grad(normalize(text_BD)).T
        same_BG = pid_B[:, None] == all_gather(pid_B)[None, :]
        exponent_BG = torch.where(
            same_BG, positive_scale * (positive_bound - cosine_BG), negative_scale * (cosine_BG - negative_bound)
        )
        loss = 2 * F.softplus(exponent_BG, threshold=40.0).sum(dtype=torch.float64) / max(1, image_BD.shape[0])
        return loss.to(cosine_BG.dtype)
