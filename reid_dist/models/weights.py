"""Loading an encoder's weights from a file, an export of ours or an open_clip tag, with a report of what matched."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from open_clip import list_models
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.models.architecture import read_architecture
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.patches import (
    RESNET_EMBEDDING,
    Interpolation,
    Patches,
    find_patches,
    resize_position_embedding,
    resnet_patches,
)

OPEN_CLIP_TAG = "open_clip:"
EXPORT_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
# What OpenAI's and open_clip's older files keep at the top level and we keep inside `text`.
_TEXT_PREFIXES = (
    "text_projection",
    "positional_embedding",
    "token_embedding",
    "transformer.",
    "ln_final.",
    "attn_mask",
)
# Only OpenAI's files have it, and all of OpenAI's models were trained with QuickGELU.
_OPENAI_MARK = "input_resolution"
# Facts about the model that OpenAI stored among its weights, and a mask that open_clip rebuilds.
_NOT_WEIGHTS = (_OPENAI_MARK, "context_length", "vocab_size", "text.attn_mask")
# What image queries have of their own (model.dual_token), and what it begins as where a file has it not.
_BEGINS_AS = {
    "visual.class_embedding_i2i": "visual.class_embedding",
    "visual.projection_i2i.weight": "visual.projection.weight",
    "visual.projection_i2i.bias": "visual.projection.bias",
}


@dataclass
class LoadReport:
    """Names of parameters and buffers by what became of them."""

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)  # from another parameter of the file
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line of counts, with the first names of what did not match."""
        parts = [f"{len(self.matched)} matched", f"{len(self.resized)} resized"]
        parts += [f"{len(self.copied)} copied ({', '.join(self.copied)})"] if self.copied else []
        for name, items in (("missing", self.missing), ("unexpected", self.unexpected)):
            shown = f" ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})" if items else ""
            parts.append(f"{len(items)} {name}{shown}")
        return ", ".join(parts)


def load_weights(
    encoder: DualEncoder,
    weights: str,
    architecture: str,
    image_size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
) -> LoadReport:
    """Loads weights into an encoder by name.

    Args:
        encoder: changed in place.
        weights: a `.safetensors` or torch state-dict file (open_clip's or OpenAI's names), a folder exported by a
            stage of ours, or `open_clip:TAG`.
        architecture: the encoder's, to look up the tag.
        image_size: (height, width) of the encoder.
        interpolation: how the image position embedding is resized where the grids differ.

    Raises:
        UserError: unreadable file, a shape or an activation that does not fit, or nothing that matches.
    """
    state, path = read_weights(weights, architecture)
    return load_state(encoder, state, path, architecture, image_size, interpolation)


def read_weights(weights: str, architecture: str) -> tuple[dict[str, Tensor], Path]:
    """Tensors by our names, and where they come from. The arguments and what is raised are those of `load_weights`."""
    path = (
        _tag_file(weights.removeprefix(OPEN_CLIP_TAG), architecture)
        if weights.startswith(OPEN_CLIP_TAG)
        else Path(weights)
    )
    raw = read_state_dict(path)
    if _OPENAI_MARK in raw:
        _check_openai_activation(architecture, path)
    return canonical_names(raw), path


def load_state(
    encoder: DualEncoder,
    state: dict[str, Tensor],
    path: Path,
    architecture: str,
    image_size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    part: Literal["", "visual.", "text."] = "",
) -> LoadReport:
    """Loads tensors of our names into an encoder, or into one tower alone.

    Args:
        encoder: changed in place.
        state: not changed.
        path: where it comes from, for messages and, in an export, for the manifest beside it.
        architecture: the encoder's, for messages.
        image_size: (height, width) of the encoder.
        interpolation: how the image position embedding is resized where the grids differ.
        part: names that do not begin with it are left alone, here and there.

    Raises:
        UserError: a shape that does not fit, or nothing that matches.
    """
    key = "model.visual_weights" if part == "visual." else "model.weights"
    state = {name: tensor for name, tensor in state.items() if name.startswith(part)}
    report = LoadReport()
    patches = find_patches(encoder.visual)
    if patches is not None and patches.embedding in state:
        grid = patches.grid(image_size)
        source = _source_grid(path, state[patches.embedding], patches, grid)
        if source != grid:
            _resize_positions(state, patches, source, grid, interpolation)
            report.resized.append(patches.embedding)
    own = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(part)}
    report.copied = [name for name, source in _BEGINS_AS.items() if name in set(own) - set(state) and source in state]
    state |= {name: state[_BEGINS_AS[name]] for name in report.copied}
    report.missing = sorted(set(own) - set(state))
    report.unexpected = sorted(set(state) - set(own))
    report.matched = sorted((set(own) & set(state)) - {*report.resized, *report.copied})
    if set(report.matched) <= {"logit_scale"}:  # a temperature alone is no match: every CLIP has one
        raise UserError(f"{key}: nothing in {path} fits {architecture}: {report.summary()}")
    for name in (*report.matched, *report.resized):
        if name == "logit_scale" and state[name].numel() == 1:
            state[name] = state[name].reshape(1)
        if state[name].shape != own[name].shape:
            remedy = "set model.prompts to that" if name.endswith(".prompts") else "choose the architecture"
            raise UserError(
                f"{key}: {name} in {path} has shape {tuple(state[name].shape)}, {architecture} wants"
                f" {tuple(own[name].shape)}; {remedy} of the file"
            )
    encoder.load_state_dict({name: state[name].to(own[name].dtype) for name in own if name in state}, strict=False)
    return report


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a file of tensors without executing anything in it.

    Raises:
        UserError: no such file, a TorchScript archive (the converter is named), or something else than tensors.
    """
    if path.is_dir():
        path = path / EXPORT_FILE
    if not path.is_file():
        raise UserError(f"model.weights: {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            raise UserError(
                f"model.weights: {path} is a TorchScript archive, which would run code; convert it once with"
                f" `python -m reid_dist.models.convert_jit {path} {path.with_suffix('.safetensors')}`"
            )
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"model.weights: cannot read {path} as tensors: {_first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and what weights_only raises for foreign classes
        raise UserError(
            f"model.weights: {path} holds more than tensors and is not loaded: {type(error).__name__}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in state.items()):
        raise UserError(f"model.weights: {path} is not a state dict (name -> tensor)")
    return state


def canonical_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names (`visual.`, `text.`, `logit_scale`) for open_clip's and OpenAI's, wrappers' `module.` removed."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "text_projection" in state:
        state = {"text." + n if n.startswith(_TEXT_PREFIXES) else n: v for n, v in state.items()}
    return {name: value for name, value in state.items() if name not in _NOT_WEIGHTS}


def _source_grid(path: Path, embedding: Tensor, patches: Patches, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a file's positions: those its manifest tells, else a square, else the encoder's own.

    Raises:
        UserError: none of these has as many positions.
    """
    positions = embedding.shape[-2] - patches.prefix if embedding.dim() > 1 else 0
    if positions < 1:
        return grid  # no such embedding at all: its shape will be refused
    manifest = path / MANIFEST_FILE if path.is_dir() else path.with_name(MANIFEST_FILE)
    if path.is_dir() or path.name == EXPORT_FILE:
        told = _manifest_grid(manifest, patches)
        # A manifest of another patch size tells nothing; the shape of the patches will be refused.
        if told is not None and min(told) > 0 and told[0] * told[1] == positions:
            return told
    side = round(positions**0.5)
    if side * side == positions:
        return side, side
    if grid[0] * grid[1] == positions:
        return grid
    raise UserError(
        f"model.weights: {patches.embedding} has {positions} grid positions, neither the {grid[0]}x{grid[1]} of"
        " model.image_size nor a square; set model.image_size and patch_stride to those of the file"
    )


def _resize_positions(
    state: dict[str, Tensor], patches: Patches, source: tuple[int, int], grid: tuple[int, int], mode: Interpolation
) -> None:
    """Resizes the image position embedding in `state` to the encoder's grid."""
    name = patches.embedding
    assert name is not None
    batched = state[name].dim() == 3  # timm's: (1, N, D)
    embedding_ND = state[name][0] if batched else state[name]
    resized_ND = resize_position_embedding(embedding_ND.float(), source, grid, mode, patches.prefix)
    state[name] = resized_ND[None] if batched else resized_ND


def _manifest_grid(manifest: Path, patches: Patches) -> tuple[int, int] | None:
    """The grid of an export of ours, cut by a tower like this one; None for manifests that are not ours."""
    try:
        model = json.loads(manifest.read_text())["model"]
        height, width = (int(side) for side in model["image_size"])
        stride = model["patch_stride"]
        if patches.embedding == RESNET_EMBEDDING:
            return resnet_patches(int(model.get("last_stride", 2))).grid((height, width))
        return patches.grid((height, width), patches.size if stride is None else (int(stride), int(stride)))
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError):
        return None


def _check_openai_activation(architecture: str, path: Path) -> None:
    """Refuses OpenAI's weights in an architecture without QuickGELU: they would load and compute something else.

    Raises:
        UserError: the architecture with it is named.
    """
    if read_architecture(architecture).get("quick_gelu"):
        return
    name = f"{architecture}-quickgelu"
    remedy = f"choose {name}" if name in list_models() else f'choose one with `"quick_gelu": true` over {architecture}'
    raise UserError(f"model.architecture: {path} is a file of OpenAI's, trained with QuickGELU; {remedy}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())


def _tag_file(tag: str, architecture: str) -> Path:
    """Downloads (or finds in the cache) the file of an open_clip tag."""
    known = list_pretrained_tags_by_model(architecture)
    if tag not in known:
        raise UserError(
            f"model.weights: open_clip has no tag {tag!r} for {architecture}; it has: {', '.join(known) or 'none'}"
        )
    settings = get_pretrained_cfg(architecture, tag)
    if bool(settings.get("quick_gelu")) != bool(read_architecture(architecture).get("quick_gelu")):
        raise UserError(
            f"model.architecture: the weights {tag!r} were trained with quick_gelu={bool(settings.get('quick_gelu'))},"
            f" unlike {architecture}; choose the architecture with (or without) `-quickgelu` in its name"
        )
    try:
        return Path(download_pretrained(settings))
    except Exception as error:  # the hub's clients raise many kinds
        raise UserError(
            f"model.weights: cannot fetch open_clip:{tag}: {_first_line(error)}; give a local file instead"
        ) from error
