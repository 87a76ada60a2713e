"""What tests of the dual encoder share: how one is built, and what it is given."""

import torch
from torch import Tensor

from reid_dist.config import ModelConfig
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder

TOKENS = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]])


def build(architecture: str, size: tuple[int, int], stride: int | None = None) -> DualEncoder:
    return build_dual_encoder(ModelConfig(architecture=architecture, image_size=size, patch_stride=stride))


def make_images(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
