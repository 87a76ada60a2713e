"""Identity classification loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def identity_loss(logits_BC: Tensor, label_B: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with label smoothing: q_ic = (1 - eps) 1[c = y_i] + eps / C (Szegedy et al. 2016, eq. of sec. 7).

    Args:
        logits_BC: identity logits of this rank's rows. Shape: (B, C).
        label_B: identity labels 0..C-1. Shape: (B,).
        smoothing: eps.

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        return F.cross_entropy(logits_BC, label_B, label_smoothing=smoothing)
