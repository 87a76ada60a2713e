"""Identity losses through a classifier that the ranks hold together.

Shape suffixes: B rows, D features.
"""

import torch
from torch import Tensor, nn

from reid_dist.config import OptimizerConfig
from reid_dist.losses.identity import identity_loss
from reid_dist.losses.sharded_identity import sharded_identity_loss
from reid_dist.models.heads import BNNeck
from reid_dist.models.row_optimizer import RowOptimizer
from reid_dist.models.sharded_classifier import ShardedClassifier
from reid_dist.optim import TrainableGroup, parameter_groups
from reid_dist.stages.contract import Surroundings

# As the dense classifier's weight is called: rules on names mean both.
_NAME = "image_losses.head.classifier.weight"


class ShardedIdentityHead(nn.Module):
    """`models.heads.IdentityClassifier` with sharded class centres: the BNNeck is the engine's, the centres are not."""

    def __init__(self, features: int, classifier: ShardedClassifier) -> None:
        super().__init__()
        self.neck = BNNeck(features)
        self.classifier = classifier

    def forward(self, feature_BD: Tensor, label_B: Tensor, smoothing: float) -> Tensor:
        """The loss of this rank's rows; a collective. Shapes: (B, D), (B,) -> ()."""
        weight_SD, class_S = self.classifier.centres(label_B)
        return sharded_identity_loss(self.neck(feature_BD), label_B, weight_SD, class_S, smoothing)


def head_loss(head: nn.Module, feature_BD: Tensor, label_B: Tensor, smoothing: float) -> Tensor:
    """The identity loss through any head, sharded or one of logits. Shapes: (B, D), (B,) -> ()."""
    if isinstance(head, ShardedIdentityHead):
        loss: Tensor = head(feature_BD, label_B, smoothing)
        return loss
    return identity_loss(head(feature_BD), label_B, smoothing)


def sharded_classifier(features: int, rate: float, run: Surroundings) -> ShardedClassifier:
    """Class centres of a run's identities, trained as its engine would train them."""
    return ShardedClassifier(
        run.identities,
        features,
        row_optimizer(run.optimizer),
        rate=rate,
        seed=run.seed,
        max_norm=run.max_grad_norm,
        device=run.device,
    )


def row_optimizer(config: OptimizerConfig) -> RowOptimizer:
    """The stage's optimizer with the learning rate and weight decay that a new classifier has in it."""
    weight = nn.Parameter(torch.empty(1, 1))  # for its two dimensions
    (group,) = parameter_groups([TrainableGroup(True, {_NAME: weight})], config)
    return RowOptimizer(config.name, group["base_lr"], group["weight_decay"], config.betas, config.eps, config.momentum)
