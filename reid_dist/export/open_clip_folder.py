"""A folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads with equal features.

Shape suffixes: N images or sentences, D features.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from reid_dist.errors import UserError
from reid_dist.export.tensors import architecture_of, write_safetensors
from reid_dist.models.patches import find_patches
from reid_dist.trained import TrainedModel

CONFIG_FILE = "open_clip_config.json"
TOLERANCE = 1e-5
SENTENCES = ("a person in a red coat", "A man, 30 years old; he wears blue jeans & carries a bag.", "a" + " long" * 99)
_ELSE = "choose --format safetensors or --format onnx"


def write_open_clip(model: TrainedModel, folder: Path) -> float:
    """Writes weights, description and tokenizer, loads them with open_clip and compares the features.

    The weights are the run's file, so `reid_dist.load` reads the folder too.

    Returns:
        The largest difference of a feature.

    Raises:
        UserError: open_clip has no such model; the reason is named.
    """
    reasons = not_expressible(model)
    if reasons:
        raise UserError(f"--format open_clip: open_clip has no {' and no '.join(reasons)}; {_ELSE}")
    write_safetensors(model, folder)
    (folder / CONFIG_FILE).write_text(json.dumps(open_clip_config(model), indent=1) + "\n")
    tokenizer = open_clip.get_tokenizer(_architecture(model)) if _is_known(model) else None
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(folder)
    return _compare(model, folder)


def not_expressible(model: TrainedModel) -> list[str]:
    """What a model has that open_clip's description of models cannot say; empty: nothing."""
    settings = model.manifest["model"]
    patches, stride = find_patches(model.encoder.visual), settings["patch_stride"]
    overlap = stride is not None and patches is not None and (stride, stride) != patches.size
    height, width = model.image_size
    # (whether the model has it, what it is called)
    parts = (
        (settings.get("word_gru") is not None, "text tower of words and a GRU (model.word_gru)"),
        (settings.get("word_gru") is None and model.manifest["words"], "tokenizer by a word list (model.vocabulary)"),
        ("row_conv" in architecture_of(model)["vision_cfg"], "RowConvTower (vision_cfg.row_conv)"),
        (settings.get("prompts") is not None, "prompts (model.prompts)"),
        (settings.get("dual_token"), "second class token (model.dual_token)"),
        (settings.get("projection") is not None, "further linear map (model.projection)"),
        (settings.get("last_stride", 2) != 2, "ResNet of last stride 1 (model.last_stride)"),
        (overlap, f"overlapping patches (model.patch_stride {stride})"),
        (
            isinstance(model.encoder.visual, ModifiedResNet) and height != width,
            f"CLIP ResNet for images that are not square (model.image_size {height}x{width})",
        ),
    )
    return [name for has, name in parts if has]


def open_clip_config(model: TrainedModel) -> dict[str, Any]:
    """`open_clip_config.json`: the towers at the model's own image size, and how images are brought to it.

    The text tower is always a `custom_text` one: that keeps the names of the weights as they are.
    """
    height, width = model.image_size
    described = architecture_of(model)
    vision, text = dict(described["vision_cfg"]), dict(described["text_cfg"])
    vision["image_size"] = height if isinstance(model.encoder.visual, ModifiedResNet) else [height, width]
    if not _is_known(model):  # CLIP's own tokenizer as it is, see `OpenClipTokenizer`
        text = {key: value for key, value in text.items() if key not in ("hf_tokenizer_name", "tokenizer_kwargs")}
    # Our encoders have no bias of the logits: it is the loss's.
    kept = {key: value for key, value in described.items() if key != "init_logit_bias"}
    settings = model.manifest["model"]
    preprocess = {
        "size": [height, width],
        "mode": "RGB",
        "mean": settings["image_mean"],
        "std": settings["image_std"],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    return {
        "model_cfg": {**kept, "vision_cfg": vision, "text_cfg": text, "custom_text": True},
        "preprocess_cfg": preprocess,
    }


def example_pictures(size: tuple[int, int]) -> list[Image.Image]:
    """Pictures of noise, at a model's size (height, width) and at others."""
    random = np.random.default_rng(0)
    sides = (size, (size[0] * 2 + 1, size[1] + 3), (7, 31))
    return [Image.fromarray(random.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]


def _compare(model: TrainedModel, folder: Path) -> float:
    """The largest difference of a feature between the model and what open_clip loads, pictures and sentences in.

    Raises:
        UserError: it is not the same model.
    """
    try:
        loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # torch, timm and transformers raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"--format open_clip: open_clip cannot build this model ({reason}); {_ELSE}") from error
    loaded.eval()
    pictures = example_pictures(model.image_size)
    with torch.inference_mode():
        image_ND = normalize(loaded.encode_image(torch.stack([preprocess(picture) for picture in pictures])), dim=1)
        text_ND = normalize(loaded.encode_text(tokenizer(list(SENTENCES))), dim=1)
    difference = max(_largest(image_ND, model.encode_image(pictures)), _largest(text_ND, model.encode_text(SENTENCES)))
    if not difference <= TOLERANCE:
        raise UserError(f"--format open_clip: open_clip's features differ by {difference:.1e}; {_ELSE}")
    return difference


def _largest(found_ND: Tensor, expected_ND: Tensor) -> float:
    return float((found_ND - expected_ND).abs().max())


def _architecture(model: TrainedModel) -> str:
    return str(model.manifest["model"]["architecture"])


def _is_known(model: TrainedModel) -> bool:
    return not _architecture(model).endswith(".json")
