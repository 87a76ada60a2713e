"""Small encoders, and their weights as an engine gives them to a stage."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist.config import ModelConfig
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages import Stage

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "row_conv": {"row_conv": {"widths": [8, 16], "groups": 2, "rows": 4}},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "dropout": {"image_size": 64, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "patch_dropout": 0.5},
}


@pytest.fixture
def make_encoder(tmp_path: Path) -> Callable[..., DualEncoder]:
    """`make_encoder("row_conv" | "resnet" | "dropout")`: 12 features of 64x32 images; the same weights each time."""

    for name, vision in VISION.items():  # now: ranks that are forked later would write them at once
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}))

    def make(vision: str = "row_conv") -> DualEncoder:
        torch.manual_seed(0)
        return build_dual_encoder(ModelConfig(architecture=str(tmp_path / f"{vision}.json"), image_size=(64, 32)))

    return make


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Stage], Callable]:
    """`weights_of(stage)`: what the engine gives `start` and `after_step`."""

    def of(stage: Stage) -> Callable:
        return lambda names: [(name, x.detach()) for name, x in stage.state_dict().items() if name in set(names)]

    return of
