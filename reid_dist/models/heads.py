"""Heads on top of the image encoder.

Shape suffixes: B rows of this rank, G rows of all ranks, D feature size, C identities.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.distributed import all_gather_with_grad, rank


class BNNeck(nn.Module):
    """Batch normalisation without a bias between embedding and classifier (Luo et al. 2019), over the GLOBAL batch.

    The statistics come from the gathered rows of all ranks, so N ranks equal one. Retrieval uses the embedding before.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Shape: (B, D) -> (B, D); in training normalised by the statistics of all ranks' rows."""
        with torch.autocast(x_BD.device.type, enabled=False):
            # The statistics are fp32 whatever the weights are (float64 in the reference tests).
            exact_BD = x_BD.to(self.running_mean.dtype)
            if not self.training:
                return self._normalize(exact_BD, training=False).to(x_BD.dtype)
            rows = x_BD.shape[0]
            x_GD = self._normalize(all_gather_with_grad(exact_BD), training=True)
            return x_GD[rank() * rows : (rank() + 1) * rows].to(x_BD.dtype)

    def _normalize(self, x_GD: Tensor, training: bool) -> Tensor:
        weight = self.weight.to(x_GD.dtype)
        return F.batch_norm(x_GD, self.running_mean, self.running_var, weight, None, training, self.momentum, self.eps)


class IdentityClassifier(nn.Module):
    """BNNeck and a linear classifier without bias: the logits of the identity loss."""

    def __init__(self, features: int, identities: int) -> None:
        super().__init__()
        self.neck = BNNeck(features)
        self.classifier = nn.Linear(features, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Shape: (B, D) -> (B, C)."""
        logits: Tensor = self.classifier(self.neck(feature_BD))
        return logits


class LinearClassifier(nn.Module):
    """One linear layer with a bias on the raw features (IRRA, Jiang & Ye, CVPR 2023): weights N(0, 0.001), bias 0."""

    def __init__(self, features: int, identities: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(features, identities)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Shape: (B, D) -> (B, C)."""
        logits: Tensor = self.classifier(feature_BD)
        return logits


class NormalizedClassifier(nn.Module):
    """An identity's logit is the length of the feature along its direction (TextReID, Han et al., BMVC 2021).

    The identities' vectors are brought to length 1, the features are not, and there is neither scale nor bias.
    """

    def __init__(self, features: int, identities: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(identities, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Shape: (B, D) -> (B, C)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(feature_BD, F.normalize(self.weight.to(wide), dim=1).to(feature_BD.dtype))
