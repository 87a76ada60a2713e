"""The mean image feature of each training identity.

Shape suffixes: C identities, D feature, N images.
"""

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.data.training_samples import TrainingSamples
from reid_dist.evaluation.features import Encoder, extract


def identity_means(
    encoder: Encoder, samples: TrainingSamples, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Tensor:
    """Directions of the identities: the mean of their images' features of unit length, brought to unit length itself.

    Every training image counts once, as it is, without augmentation. A collective: every rank calls it and gets the
    same.

    Args:
        encoder: of images.
        samples: of the training stage, whose identity numbers are the rows of the result.
        batch_size: images of a block.
        device: of the encoder.

    Returns:
        fp32 on the device. Shape: (C, D).

    Raises:
        UserError: an image does not decode, or the encoder gives nan or inf.
    """
    sums: Tensor | None = None
    for number, shards in enumerate(samples.shards):
        items = np.flatnonzero(samples.set_N == number)
        rows, first = np.unique(samples.row_N[items], return_index=True)  # an item may be one of an image's captions
        # Added up on the CPU: a GPU adds in any order, and the ranks would hold other bits.
        image_ND = extract(encoder, shards, rows, samples.image_size, None, batch_size, device).image_ND.cpu()
        if sums is None:
            sums = image_ND.new_zeros(len(samples.identities), image_ND.shape[1])
        sums.index_add_(0, torch.from_numpy(samples.pid_N[items[first]]), image_ND)
    assert sums is not None  # there is at least one set
    return nn.functional.normalize(sums, dim=1).to(device)
