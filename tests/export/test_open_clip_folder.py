"""open_clip's folder: open_clip alone loads it, with the features, the tokenizer and the preprocessing of the run."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from reid_dist import load
from reid_dist.data.tokenizer import OpenClipTokenizer
from reid_dist.errors import UserError
from reid_dist.export import open_clip_folder
from reid_dist.export.open_clip_folder import open_clip_config, write_open_clip
from tests.export.models import SIZE, export_model, register

SENTENCES = ["a woman in a red coat", "He carries 2 bags &amp; more!", "a" + " very" * 300 + " long coat", "über"]
SIGLIP_TEXT = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_kwargs": {"eps": 1e-3}}
ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "normalised otherwise": {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4), "patch_stride": 16},
    "quick gelu": {"towers": {"quick_gelu": True, "vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}}},
    "siglip": {"towers": {"text_cfg": SIGLIP_TEXT, "vision_cfg": ATTENTION_POOL, "init_logit_bias": -10}},
    "tokenizer not taken": {"towers": {"text_cfg": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "lower"}}}},
    "clip resnet": {"vision": "resnet", "image_size": (64, 64)},
    "timm": {"vision": "timm_resnet"},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "words": ({"words": True}, r"tokenizer by a word list \(model\.vocabulary\)"),
    "row_conv": ({"vision": "row_conv", "words": True}, r"word list .* and no RowConvTower"),
    "gru": ({"word_gru": {"hidden": 6, "features": 8, "context_length": 8}}, "text tower of words and a GRU"),
    "prompts": ({"prompts": {"visual_depth": 1, "text_depth": 1}}, "prompts"),
    "dual_token": ({"dual_token": True}, "second class token"),
    "projection": ({"projection": 10}, "further linear map"),
    "overlap": ({"patch_stride": 12}, r"overlapping patches \(model\.patch_stride 12\)"),
    "last_stride": ({"vision": "resnet", "image_size": (64, 64), "last_stride": 1}, "last stride 1"),
    "resnet": ({"vision": "resnet"}, r"not square \(model\.image_size 64x32\)"),
    "timm": ({"vision": "timm_vit", "image_size": (64, 32)}, r"open_clip cannot build this model \(size mismatch"),
}  # fmt: skip


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in ((200, 77), (5, 9), SIZE)]


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip_loads_equal_features(kind: str, tmp_path: Path) -> None:
    model = load(export_model(tmp_path / "run", **KINDS[kind]))
    folder = tmp_path / "out"
    folder.mkdir()
    assert write_open_clip(model, folder) <= 1e-5
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    loaded.eval()
    assert torch.equal(tokenizer(SENTENCES), model.tokenizer(SENTENCES))
    with torch.inference_mode():
        image = loaded.encode_image(torch.stack([preprocess(picture) for picture in pictures()]))
        text = loaded.encode_text(tokenizer(SENTENCES))
    torch.testing.assert_close(normalize(image, dim=1), model.encode_image(pictures()), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalize(text, dim=1), model.encode_text(SENTENCES), rtol=0, atol=1e-5)
    assert loaded.logit_scale.item() == pytest.approx(model.encoder.logit_scale.item())
    assert getattr(loaded, "logit_bias", None) is None
    # The weights are the run's own file, so this program reads the folder too.
    again = load(folder)
    assert again.digest == model.digest and torch.equal(again.encode_text(SENTENCES), model.encode_text(SENTENCES))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_open_clip_cannot_express_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[kind]
    model = load(export_model(tmp_path / "run", **settings))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=reason) as refusal:
        write_open_clip(model, tmp_path / "out")
    assert "safetensors" in str(refusal.value) and "onnx" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(export_model(tmp_path / "run"))
    wrong = open_clip_config(model)
    wrong["preprocess_cfg"]["resize_mode"] = "shortest"
    monkeypatch.setattr(open_clip_folder, "open_clip_config", lambda _: wrong)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="open_clip's features differ by"):
        write_open_clip(model, tmp_path / "out")


class FakeTokenizer(open_clip.tokenizer.HFTokenizer):
    """A tokenizer of Hugging Face's kind, from a file in a folder, or by name from a hub that is not asked twice."""

    asked: ClassVar[list[str]] = []

    def __init__(self, source: str | Path, context_length: int, **_: Any) -> None:
        self.context_length, self.vocab_size = context_length, 90
        if not isinstance(source, Path):
            self.asked.append(source)
            self.shift = 7
        else:
            self.shift = json.loads((source / "tokenizer.json").read_text())

    def save_pretrained(self, dest: Path) -> None:
        (dest / "tokenizer.json").write_text(json.dumps(self.shift))

    def __call__(self, texts: list[str], context_length: int | None = None) -> torch.Tensor:
        rows = [[(ord(letter) + self.shift) % 90 for letter in text.ljust(12)[:12]] for text in texts]
        return torch.tensor(rows)


def test_a_tokenizer_of_its_own_goes_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path, "tiny-hf", vocab_size=90, hf_tokenizer_name="someone/tokenizer", pool_type="last")
    monkeypatch.setattr(open_clip.factory, "HFTokenizer", FakeTokenizer)
    model = load(export_model(tmp_path / "run", name="tiny-hf"))
    assert isinstance(model.tokenizer, OpenClipTokenizer)
    (tmp_path / "out").mkdir()
    write_open_clip(model, tmp_path / "out")
    FakeTokenizer.asked.clear()
    found = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(SENTENCES)
    assert torch.equal(found, model.tokenizer(SENTENCES)) and not FakeTokenizer.asked
    monkeypatch.setattr(FakeTokenizer, "save_pretrained", lambda *_: None)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"cannot build this model \(.*tokenizer\.json"):
        write_open_clip(model, tmp_path / "other")
