"""Image-text contrastive loss over the global batch.

Shape suffixes: B rows of this rank, G = world_size x B rows of all ranks, D feature size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import all_gather, all_gather_with_grad, rank


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, pid_B: Tensor | None = None) -> Tensor:
    """Symmetric softmax contrastive loss (CLIP, Radford et al. 2021); with identities, of soft multi-positive targets.

    With `pid_B` the target of row i is q_ij = 1[y_i = y_j] / sum_k 1[y_i = y_k] over the global batch, so every pair
    of one identity is a positive (the label distribution of IRRA's SDM, Jiang & Ye, CVPR 2023, with cross-entropy
    in place of the reversed KL). Without it the only positive is the own pair.

    Args:
        image_BD: image features, need not be normalised. Shape: (B, D).
        text_BD: text features of the same pairs. Shape: (B, D).
        logit_scale: inverse temperature (already exponentiated). Shape: () or (1,).
        pid_B: identities, int64. Shape: (B,).

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD = F.normalize(_at_least_fp32(image_BD), dim=-1)
        text_BD = F.normalize(_at_least_fp32(text_BD), dim=-1)
        image_GD = all_gather_with_grad(image_BD)
        text_GD = all_gather_with_grad(text_BD)
        target_BG = _targets(image_BD, pid_B, image_GD.shape[0])
        image_to_text = _soft_cross_entropy(logit_scale * image_BD @ text_GD.T, target_BG)
        text_to_image = _soft_cross_entropy(logit_scale * text_BD @ image_GD.T, target_BG)
        return (image_to_text + text_to_image) / 2


def _targets(feature_BD: Tensor, pid_B: Tensor | None, global_rows: int) -> Tensor:
    """Label distribution of this rank's rows over the global batch. Shape: (B, G)."""
    rows = feature_BD.shape[0]
    if pid_B is None:
        own_B = torch.arange(rows, device=feature_BD.device) + rank() * rows
        return F.one_hot(own_B, global_rows).to(feature_BD.dtype)
    same_BG = (pid_B[:, None] == all_gather(pid_B)[None, :]).to(feature_BD.dtype)
    return same_BG / same_BG.sum(dim=1, keepdim=True)


def _soft_cross_entropy(logits_BG: Tensor, target_BG: Tensor) -> Tensor:
    return -(target_BG * logits_BG.log_softmax(dim=1)).sum(dim=1).mean()


def _at_least_fp32(x: Tensor) -> Tensor:
    # Half-precision logits move the loss by per cents at temperature 0.01; float64 stays for the reference tests.
    return x if x.dtype == torch.float64 else x.float()
