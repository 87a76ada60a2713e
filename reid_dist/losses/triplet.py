"""Batch-hard triplet loss over the global batch.

Shape suffixes: B rows of this rank, G rows of all ranks, D feature size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import all_gather, all_gather_with_grad


def batch_hard_triplet_loss(feature_BD: Tensor, pid_B: Tensor, margin: float | None = 0.3) -> Tensor:
    """Hinge on the hardest positive and hardest negative of each anchor (Hermans et al. 2017, eq. 5), or soft margin.

    max(0, m + d_ap - d_an), or without m log(1 + exp(d_ap - d_an)), which never stops pulling (ibid., sec. 2).

    Anchors are this rank's rows, candidates the rows of all ranks. Distances are Euclidean (not squared) on features
    as they come; identities are compared by label, so any number of images per identity is fine. An anchor without a
    negative in the global batch contributes 0.

    Args:
        feature_BD: Shape: (B, D).
        pid_B: identities, int64. Shape: (B,).
        margin: in units of the distance; None: soft.

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(feature_BD.device.type, enabled=False):
        feature_BD = feature_BD if feature_BD.dtype == torch.float64 else feature_BD.float()
        # The direct form: expanding |a-b|^2 into products loses the digits that decide between near-equal candidates.
        distance_BG = torch.cdist(
            feature_BD, all_gather_with_grad(feature_BD), compute_mode="donot_use_mm_for_euclid_dist"
        )
        same_BG = pid_B[:, None] == all_gather(pid_B)[None, :]
        hardest_positive_B = distance_BG.masked_fill(~same_BG, 0.0).amax(dim=1)
        hardest_negative_B = distance_BG.masked_fill(same_BG, torch.inf).amin(dim=1)
        excess_B = hardest_positive_B - hardest_negative_B
        return (F.softplus(excess_B) if margin is None else (margin + excess_B).clamp(min=0)).mean()
