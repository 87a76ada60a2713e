"""Tiny trained models of every kind, as a stage leaves them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch

from reid_dist.checkpoint.portable import save_export
from reid_dist.config import ModelConfig
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dictionary import Dictionary, write_dictionary

SIZE = (64, 32)
WORDS = ["a", "person", "in", "red", "blue", "coat"]
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 64, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "row_conv": {"row_conv": {"widths": [8, 16], "groups": 2, "rows": 4}},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "timm_resnet": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
    "timm_vit": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
}


def export_model(folder: Path, vision: str = "vit", words: bool = False, **settings: Any) -> Path:
    """An export with its run's folder around it; the files it was made from stay in `folder / "sources"`.

    Args:
        folder: of the run.
        vision: one of VISION.
        words: a word list in place of CLIP's tokenizer.
        settings: of the model; `towers` may change the architecture, `name` is an architecture that open_clip knows.
    """
    sources, record = folder / "sources", {"stage": "t2i", "kind": "t2i", "steps": 3, "trainable": [], "frozen": []}
    sources.mkdir(parents=True)
    towers, name = settings.pop("towers", {}), settings.pop("name", None)
    if name is None:
        text = {**TEXT, **({"vocab_size": 50} if words else {}), **towers.pop("text_cfg", {})}
        vision_cfg = {**VISION[vision], **towers.pop("vision_cfg", {})}
        (sources / "tiny.json").write_text(
            json.dumps({"embed_dim": 12, "vision_cfg": vision_cfg, "text_cfg": text, **towers})
        )
    if settings.get("word_gru") is not None:
        write_dictionary(sources / "words.safetensors", Dictionary(WORDS, torch.randn(len(WORDS), 5)), "key")
        settings["word_gru"] = {**settings["word_gru"], "dictionary": sources / "words.safetensors"}
    elif words:
        (sources / "words.txt").write_text("\n".join(WORDS) + "\n")
        settings["vocabulary"] = sources / "words.txt"
    architecture = name or str(sources / "tiny.json")
    config = ModelConfig.model_validate({"architecture": architecture, "image_size": SIZE, **settings})
    torch.manual_seed(0)
    encoder = build_dual_encoder(config).eval()
    for parameter in encoder.parameters():  # zeros at the start would hide what was not loaded
        parameter.data += 0.1 * torch.randn_like(parameter)
    for buffer_name, buffer in encoder.named_buffers():
        if "running_var" in buffer_name:
            buffer.uniform_(0.5, 2)
    state = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    state["classifier.weight"] = torch.ones(3, 12)  # of the stage, not of the model
    handover = {"identity_prompts": torch.ones(3, 12)}
    listed = WORDS if words or settings.get("word_gru") is not None else None
    save_export(folder / "t2i" / "export", state, config, listed, record, handover)
    return folder / "t2i" / "export"


def register(monkeypatch: Any, folder: Path, name: str, **towers: Any) -> None:
    """Makes a tiny architecture known to open_clip by name, for one test."""
    config = {"embed_dim": 12, "vision_cfg": VISION["vit"], "text_cfg": {**TEXT, **towers}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
