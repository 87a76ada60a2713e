"""Sigmoid image-text loss over the global batch.

Shape suffixes: B rows of this rank, G rows of all ranks, D feature size.
"""

import torch
from torch import Tensor

from reid_dist.distributed import all_gather, all_gather_with_grad
from reid_dist.kernels.contrastive import siglip
from reid_dist.losses.contrastive import normalize, own_rows


def sigmoid_loss(
    image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, bias: Tensor, ids_B: Tensor | None = None
) -> Tensor:
    """Every image-text pair as a yes-or-no question (SigLIP, Zhai et al. 2023, eq. 1).

    (1 / G) sum_ij log(1 + exp(-z_ij (exp(log_scale) cos_ij + bias))) over the G x G pairs of the global batch, with
    z_ij = 1 for pairs of one id, else -1. No softmax: no sum over a row is needed before its gradient.

    Args:
        image_BD: image features, need not be normalised. Shape: (B, D); B may be 0, on all ranks alike.
        text_BD: text features of the same pairs. Shape: (B, D).
        log_scale: natural log of the inverse temperature (published start: log 10). Shape: () or (1,).
        bias: added to every logit (published start: -10, for one positive stands against G - 1 negatives).
            Shape: () or (1,).
        ids_B: which rows are of one person, or are one sample met again; int64. None: only the own pair is
            positive, as published. Shape: (B,).

    Returns:
        Scalar, 0 without rows; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_GD = normalize(image_BD), all_gather_with_grad(normalize(text_BD))
        if ids_B is None:
            ids_G = torch.arange(text_GD.shape[0], dtype=torch.int32, device=text_GD.device)
        else:
            ids_G = all_gather(ids_B)
            # The place of an id among all of them stands for it: a stream's ids have more than 31 bits.
            ids_G = torch.searchsorted(ids_G.sort().values, ids_G).to(torch.int32)
        loss_B = siglip(image_BD, text_GD, own_rows(ids_G), ids_G, log_scale, bias)
        return loss_B.sum() / max(1, loss_B.shape[0])
