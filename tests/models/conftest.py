"""Tiny architectures as JSON files: a ViT of open_clip's form, a ModifiedResNet and our own tower."""

import json
from pathlib import Path
from typing import Any

import pytest

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
        "text_cfg": TEXT,
    },
    "row_conv": {
        "embed_dim": 12,
        "vision_cfg": {"row_conv": {"widths": [8, 16], "groups": 2, "rows": 4}},
        "text_cfg": TEXT,
    },
}


@pytest.fixture
def architectures(tmp_path: Path) -> dict[str, str]:
    """Path of the JSON file of each architecture."""
    for name, config in ARCHITECTURES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return {name: str(tmp_path / f"{name}.json") for name in ARCHITECTURES}


@pytest.fixture
def configs() -> dict[str, dict[str, Any]]:
    """The same as dictionaries, a fresh copy."""
    copies: dict[str, dict[str, Any]] = json.loads(json.dumps(ARCHITECTURES))
    return copies
