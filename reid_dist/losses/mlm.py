"""Masked language loss over the global batch.

Shape suffixes: B captions of this rank, L tokens of a caption, V words of the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import sum_over_ranks, world_size

# As the batches say it, and torch's cross-entropy.
NO_LABEL = -100


def masked_language_loss(logits_BLV: Tensor, label_BL: Tensor) -> Tensor:
    """Cross-entropy at the masked positions, averaged over those of ALL ranks (IRRA, Jiang & Ye, CVPR 2023).

    Ranks mask different numbers of words: a mean of the ranks' own means would not be the global batch's.

    Args:
        logits_BLV: of every position. Shape: (B, L, V); B may be 0.
        label_BL: the original id where a word was masked, NO_LABEL elsewhere. Shape: (B, L).

    Returns:
        Scalar, 0 without a label; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(logits_BLV.device.type, enabled=False):
        # All positions, though few have a label: --dry-run runs without values, so it cannot select by them.
        exact_BLV = logits_BLV if logits_BLV.dtype == torch.float64 else logits_BLV.float()
        total = F.cross_entropy(exact_BLV.flatten(0, 1), label_BL.flatten(), ignore_index=NO_LABEL, reduction="sum")
        return total * world_size() / sum_over_ranks((label_BL != NO_LABEL).sum()).clamp(min=1)
