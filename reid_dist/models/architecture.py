"""Builds a dual encoder from an open_clip architecture, or our own JSON file, and the other settings of `model`."""

import copy
import difflib
import json
from pathlib import Path
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import DualEncoder, TextShape
from reid_dist.models.linear import new_linear
from reid_dist.models.patches import check_image_size, find_patches, set_image_size, set_patch_stride
from reid_dist.models.resnet import ResNetTower, TimmTower, keep_last_resolution
from reid_dist.models.row_conv import RowConvTower
from reid_dist.models.text_transformer import TextTower
from reid_dist.models.tower import Projects
from reid_dist.models.vit import VitTower
from reid_dist.models.word_tower import WordGRU, build_word_tower

_LEAST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def read_architecture(architecture: str) -> dict[str, Any]:
    """The model's JSON description: a file ending in `.json`, or the name of an open_clip architecture.

    Raises:
        UserError: no such file, no such name (the nearest are offered), or a file that lacks a section.
    """
    if architecture.endswith(".json"):
        try:
            config: dict[str, Any] = json.loads(Path(architecture).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"model.architecture: cannot read {architecture}: {error}") from error
    else:
        known = open_clip.get_model_config(architecture)
        if known is None:
            raise UserError(_unknown_architecture(architecture))
        config = copy.deepcopy(known)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise UserError(f"model.architecture: {architecture} lacks {', '.join(sorted(missing))}")
    return config


def build_dual_encoder(model: ModelConfig) -> DualEncoder:
    """Builds an encoder with random weights; nothing is read but the architecture and a dictionary of words.

    Args:
        model: `architecture` is the name of an open_clip architecture, or the path of a JSON file of the same form,
            whose `vision_cfg` may instead hold `row_conv`: the arguments of `RowConvTower`.

    Raises:
        UserError: unknown architecture, or settings that it cannot follow.
    """
    config = read_architecture(model.architecture)
    if "multimodal_cfg" in config:
        raise UserError(
            f"model.architecture: {model.architecture} is a CoCa (multimodal_cfg), whose towers return tokens for a"
            " caption decoder; choose an architecture with two towers, such as ViT-B-16"
        )
    try:
        visual, text = _towers(config, model)
        if model.last_stride == 1:
            keep_last_resolution(visual)
        patches = find_patches(visual)
        if patches is not None:
            check_image_size(patches, model.image_size, model.patch_stride)
        set_image_size(visual, model.image_size)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
    ) as error:  # an unknown key, heads that do not divide ...
        raise UserError(f"model.architecture: {model.architecture} cannot be built: {error}") from error
    if model.patch_stride is not None:
        set_patch_stride(visual, model.patch_stride, model.image_size)
    features = model.projection or config["embed_dim"]
    visual, text = _own_visual(visual, model), _own_text(text, model, features)
    _check_width(visual, config["embed_dim"], model.architecture)
    if model.projection is not None:
        for tower in (visual, text):
            _project(tower, config["embed_dim"], model.projection)
    length = text.caption_length if isinstance(text, TextTower) else text.context_length
    shape = TextShape(int(length), int(text.vocab_size))  # type: ignore[arg-type]
    return DualEncoder(visual, text, shape, features, model.image_mean, model.image_std)


def set_patch_dropout(visual: nn.Module, share: float) -> None:
    """Leaves out a random share of an image's patches in training (Li et al. 2023, FLIP); 0: none.

    Raises:
        UserError: a tower without patches.
    """
    if not isinstance(visual, VitTower):
        raise UserError("patch_dropout: only open_clip's ViT towers can leave patches out; remove the key")
    visual.set_patch_dropout(share)


def _towers(config: dict[str, Any], model: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The towers as their libraries build them; in place of one that words and a GRU replace stands a small one."""
    if model.word_gru is not None:
        config = {**config, "text_cfg": _LEAST_TEXT}
    if "row_conv" in config["vision_cfg"]:
        arguments = {**config["vision_cfg"]["row_conv"], "dual_token": model.dual_token}
        visual = RowConvTower(config["embed_dim"], **arguments)
        return visual, TextTransformer(output_dim=config["embed_dim"], **config["text_cfg"])
    towers = _open_clip_towers(config, model.image_size)
    return towers.visual, towers.text


def _own_visual(tower: nn.Module, model: ModelConfig) -> nn.Module:
    """Our class around a tower of open_clip's or timm's; our own as they are.

    Raises:
        UserError: prompts or a second class token in a tower that can have none.
    """
    if model.attention_pool == "redrawn" and not isinstance(tower, ModifiedResNet):
        raise UserError("model.attention_pool: only CLIP's ResNets, such as RN50, have one; remove the key")
    length, depth = (model.prompts.visual_length, model.prompts.visual_depth) if model.prompts else (0, 1)
    if isinstance(tower, VisionTransformer):
        return VitTower(tower, length, depth, model.dual_token)
    if length:
        raise UserError("model.prompts.visual_length: only open_clip's ViT towers have blocks for prompts; set it to 0")
    if model.dual_token and not isinstance(tower, RowConvTower):
        raise UserError("model.dual_token: only open_clip's ViT towers have a class token; remove the key")
    if isinstance(tower, ModifiedResNet):
        return ResNetTower(tower)
    return TimmTower(tower) if isinstance(tower, TimmModel) else tower


def _check_width(visual: nn.Module, embed_dim: int, architecture: str) -> None:
    """Refuses a timm model that nothing maps to the width that the architecture states."""
    if not isinstance(visual, TimmTower):
        return
    head: Any = visual.head
    trunk: Any = visual.trunk
    if not len(head) and not trunk.num_classes and trunk.num_features != embed_dim:
        raise UserError(
            f"model.architecture: {architecture} has timm_proj none, so its features are the backbone's"
            f" {trunk.num_features}; set embed_dim to that"
        )


def _project(tower: nn.Module, width: int, features: int) -> None:
    """Ends a tower in a further linear map; words and GRU end in their only one.

    Raises:
        UserError: a tower that is not ours.
    """
    if isinstance(tower, WordGRU):
        return
    if not isinstance(tower, Projects):
        raise UserError("model.projection: a tower of this architecture is not open_clip's own; remove the key")
    tower.projection_head = new_linear(width, features)


def _own_text(tower: nn.Module, model: ModelConfig, features: int) -> nn.Module:
    """Our class around open_clip's text transformer, or words and a GRU instead; other towers as they are.

    Raises:
        UserError: prompts in a tower that can have none, or words that cannot be read.
    """
    if model.word_gru is not None:
        return build_word_tower(model, features)
    length, depth = (model.prompts.text_length, model.prompts.text_depth) if model.prompts else (0, 1)
    if isinstance(tower, TextTransformer):
        return TextTower(tower, length, depth)
    if length:
        raise UserError("model.prompts.text_length: only open_clip's text transformer takes prompts; set it to 0")
    return tower


def _open_clip_towers(config: dict[str, Any], image_size: tuple[int, int]) -> open_clip.CustomTextCLIP:
    """open_clip's towers; its own ViT is built at our image size, the others get it from `set_image_size`."""
    config = {k: v for k, v in config.items() if k != "custom_text"}
    if not isinstance(config["vision_cfg"].get("layers"), list):
        config["vision_cfg"] = {**config["vision_cfg"], "image_size": image_size}
    return open_clip.CustomTextCLIP(**config, nonscalar_logit_scale=True)


def _unknown_architecture(name: str) -> str:
    near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    offer = f"; nearest: {', '.join(near)}" if near else ""
    return f"model.architecture: open_clip knows no {name!r}{offer}. A JSON file's name must end in .json"
