"""Where each kind of tower keeps its last linear map."""

from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from torch import nn

from reid_dist.models.row_conv import RowConvTower
from reid_dist.models.word_tower import WordGRU


def projection_names(tower: nn.Module) -> set[str]:
    """Names, within a tower, of the parameters of its last linear map, from its own width to D; empty: it has none."""
    projection: Any
    if getattr(tower, "projection_head", None) is not None:
        projection = tower.projection_head
    elif isinstance(tower, ModifiedResNet):
        projection = tower.attnpool.c_proj
    elif isinstance(tower, RowConvTower | WordGRU):
        projection = tower.projection
    elif isinstance(tower, TextTransformer):
        projection = tower.text_projection
    elif isinstance(tower, TimmModel):
        # Added by open_clip, plain or at the end of an MLP, or what timm calls the classifier.
        head = tower.head
        projection = head.proj if hasattr(head, "proj") else head.mlp.fc2 if hasattr(head, "mlp") else None
        projection = tower.trunk.get_classifier() if projection is None else projection
    else:
        projection = getattr(tower, "proj", None)
    parameters = list(projection.parameters()) if isinstance(projection, nn.Module) else [projection]
    return {name for name, parameter in tower.named_parameters() if any(parameter is p for p in parameters)}
