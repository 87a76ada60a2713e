"""The weights that a run begins with: of the whole encoder, of the image tower alone, and what is drawn anew."""

from pathlib import Path
from typing import Final

import timm
import torch
from torch import Tensor

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import read_architecture
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.resnet import TimmTower, redraw_attention_pool
from reid_dist.models.weights import canonical_names, load_state, load_weights, read_state_dict

TIMM = "timm:"
_VISUAL: Final = "visual."


def load_first_weights(encoder: DualEncoder, model: ModelConfig) -> list[str]:
    """Loads `model.weights`, then `model.visual_weights`; then draws what `model.attention_pool` wants drawn.

    Args:
        encoder: as built, changed in place.
        model: its settings.

    Returns:
        A line for people on each thing that was done.

    Raises:
        UserError: see `load_weights`; or a backbone that timm does not have.
    """
    said = []
    if model.weights is not None:
        report = load_weights(
            encoder, model.weights, model.architecture, model.image_size, model.position_interpolation
        )
        said.append(f"weights {model.weights}: {report.summary()}")
    if model.visual_weights is not None:
        state, path = _visual_state(encoder, model, model.visual_weights)
        report = load_state(
            encoder, state, path, model.architecture, model.image_size, model.position_interpolation, _VISUAL
        )
        said.append(f"visual_weights {model.visual_weights}: {report.summary()}")
    if model.attention_pool == "redrawn":
        redraw_attention_pool(encoder.visual)
        said.append("attention_pool: projections drawn anew, as TextReID's code does")
    return said


def _visual_state(encoder: DualEncoder, model: ModelConfig, weights: str) -> tuple[dict[str, Tensor], Path]:
    """Tensors by our names, of timm or of a file: timm's, a whole encoder's, or those of an image tower alone."""
    trunk = f"{_VISUAL}trunk." if isinstance(encoder.visual, TimmTower) else _VISUAL
    if weights.startswith(TIMM):
        return {trunk + name: tensor for name, tensor in _timm_state(model, weights).items()}, Path(weights)
    state = canonical_names(read_state_dict(Path(weights)))
    if not any(name.startswith(_VISUAL) for name in state):
        state = {trunk + name: tensor for name, tensor in state.items()}
    return state, Path(weights)


def _timm_state(model: ModelConfig, weights: str) -> dict[str, Tensor]:
    """Pretrained weights of the architecture's own backbone; `timm:TAG` chooses among several."""
    name = read_architecture(model.architecture)["vision_cfg"].get("timm_model_name")
    if name is None:
        raise UserError(
            f"model.visual_weights: {model.architecture} has no timm backbone (timm_model_name); name a file"
        )
    tag = weights.removeprefix(TIMM)
    full_name = f"{name.partition('.')[0]}.{tag}" if tag else name
    try:
        with torch.device("cpu"):
            trunk = timm.create_model(full_name, pretrained=True)
    except Exception as error:  # the hub's clients raise many kinds
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.visual_weights: cannot fetch timm's {full_name}: {line}; give a local file instead"
        ) from error
    state: dict[str, Tensor] = trunk.state_dict()
    return state
