"""Text encoders that give a vector to a word: CLIP's and our own towers, Hugging Face's models, and chance.

Shape suffixes: N words, B words at a time, P pieces of a word, E encoder layers, W width of a vector.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from reid_dist.config import ModelConfig
from reid_dist.data.tokenizer import Tokenizer, WordTokenizer, build_tokenizer, read_vocabulary
from reid_dist.errors import UserError
from reid_dist.files import content_sha256
from reid_dist.models.architecture import build_dual_encoder, read_architecture
from reid_dist.models.weights import EXPORT_FILE, MANIFEST_FILE, load_state, read_weights

Layers = Literal["mean4", "concat4", "second_last", "last"]
_BATCH = 256


class WordSource(Protocol):
    """Reads words, each alone.

    Attributes:
        content: all that decides the vectors beside the words: names of choices and hashes of files.
        name: one line for people.
    """

    content: list[str]
    name: str

    def unknown(self, words: Sequence[str]) -> int:
        """How many of the words it does not know, and reads as one and the same."""

    def vectors(self, words: Sequence[str]) -> Tensor:
        """fp32, as the encoder gives them, not normalised. Shape: (N, W)."""


class TowerSource:
    """A text tower of open_clip's or ours: a word's feature as `encode_text` gives it.

    In CLIP that is the end token's last state behind the text projection (TextReID; methods.md 3.3).

    Args:
        weights: as `model.weights`; the folder of an exported stage brings architecture and words with it.
        architecture: as `model.architecture`; wanted but for an export.
        vocabulary: word list of the tower's own tokenizer, for architectures that are trained with one.

    Raises:
        UserError: unreadable weights, or such as leave a part of the text tower without.
    """

    def __init__(self, weights: str, architecture: str | None = None, vocabulary: Path | None = None) -> None:
        model, words = _export_model(Path(weights)) if Path(weights).is_dir() else (None, None)
        if architecture is not None or model is None:
            model = _plain_model(architecture, weights)
        if vocabulary is not None:
            words = read_vocabulary(vocabulary)
        state, path = read_weights(weights, model.architecture)
        self.encoder = build_dual_encoder(model).eval().requires_grad_(False)
        report = load_state(self.encoder, state, path, model.architecture, model.image_size, part="text.")
        if report.missing:
            raise UserError(
                f"--weights: {path} does not fill the text tower of {model.architecture}: {report.summary()}"
            )
        shape = self.encoder.text_shape
        self.tokenizer: Tokenizer
        if words is None:
            self.tokenizer = build_tokenizer(None, model.architecture, shape.context_length, shape.vocab_size)
        else:
            framed = model.word_gru is None
            self.tokenizer = WordTokenizer(words, shape.context_length, shape.vocab_size, framed)
        architecture_text = json.dumps(read_architecture(model.architecture), sort_keys=True)
        file = path / EXPORT_FILE if path.is_dir() else path
        self.content = ["tower", architecture_text, content_sha256(file), "\n".join(words or ())]
        self.name = f"{model.architecture} with {weights}"

    def unknown(self, words: Sequence[str]) -> int:
        """See `WordSource.unknown`: of a word list's tokenizer, those that it lacks."""
        known = set(self.tokenizer.words) if isinstance(self.tokenizer, WordTokenizer) else set(words)
        return len(set(words) - known)

    @torch.no_grad()
    def vectors(self, words: Sequence[str]) -> Tensor:
        """See `WordSource.vectors`."""
        parts = [self.encoder.encode_text(self.tokenizer(part)) for part in _batches(words)]
        return torch.cat(parts).float()


class HuggingFaceSource:
    """A text model in a local folder: the mean over a word's pieces, start and end left out, of some layers.

    TextReID's code has dictionaries of BERT called "c4" and "l2", which its authors do not explain: probably the last
    four layers side by side, and the second to last.

    Args:
        folder: as `save_pretrained` writes it, weights as safetensors, with the tokenizer's files.
        layers: the mean of the last four, these side by side, the second to last, or the last.

    Raises:
        UserError: transformers is not installed, or the folder holds no such model.
    """

    def __init__(self, folder: Path, layers: Layers = "mean4") -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(
                "--hf: needs the package transformers; install it with `pip install reid_dist[hf]`"
            ) from error
        if not (folder / "config.json").is_file():
            raise UserError(f"--hf: {folder} holds no config.json; name the folder of a downloaded model")
        # Nothing is fetched, and no code or pickle of the folder runs.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
            self.model: nn.Module = AutoModel.from_pretrained(folder, use_safetensors=True, **local).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--hf: {folder} cannot be read as a text model with safetensors: {line}") from error
        files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".txt", ".model"))
        self.layers = layers
        self.content = ["hugging face", layers, *(f"{file.name} {content_sha256(file)}" for file in files)]
        self.name = f"{folder.name} (layers {layers}, mean over pieces)"

    def unknown(self, words: Sequence[str]) -> int:
        """See `WordSource.unknown`."""
        own = self.tokenizer.unk_token_id
        rows = self.tokenizer(list(words), add_special_tokens=False)["input_ids"]
        return sum(own in row for row in rows) if own is not None else 0

    @torch.no_grad()
    def vectors(self, words: Sequence[str]) -> Tensor:
        """See `WordSource.vectors`."""
        return torch.cat([self._read(part) for part in _batches(words)])

    def _read(self, words: Sequence[str]) -> Tensor:
        read = self.tokenizer(list(words), padding=True, return_special_tokens_mask=True, return_tensors="pt")
        special_BP = read.pop("special_tokens_mask").bool() | ~read["attention_mask"].bool()
        layers = self.model(**read, output_hidden_states=True).hidden_states
        weight_BP1 = (~special_BP).float()[:, :, None]
        summed_BW: Tensor = (_choose(layers, self.layers).float() * weight_BP1).sum(1)
        mean_BW: Tensor = summed_BW / weight_BP1.sum(1).clamp_min(1)
        return mean_BW


class RandomSource:
    """Normal vectors by the position of a word: what frozen vectors are worth that know nothing."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self.width, self.seed = width, seed
        self.content = ["random", str(width), str(seed)]
        self.name = f"chance (N(0, 1), seed {seed})"

    def unknown(self, words: Sequence[str]) -> int:
        """See `WordSource.unknown`."""
        return 0

    def vectors(self, words: Sequence[str]) -> Tensor:
        """See `WordSource.vectors`."""
        return torch.randn(len(words), self.width, generator=torch.Generator().manual_seed(self.seed))


def _choose(layers: Sequence[Tensor], choice: Layers) -> Tensor:
    """One tensor out of the states of all layers, the embeddings first. Shape: E x (B, P, W) -> (B, P, W) or wider."""
    if choice == "mean4":
        return torch.stack(list(layers[-4:])).mean(0)
    if choice == "concat4":
        return torch.cat(list(layers[-4:]), dim=2)
    return layers[-2 if choice == "second_last" else -1]


def _batches(words: Sequence[str]) -> list[list[str]]:
    return [list(words[start : start + _BATCH]) for start in range(0, len(words), _BATCH)]


def _plain_model(architecture: str | None, weights: str) -> ModelConfig:
    """An architecture by name or file, at the image size that its own description states: no image is read."""
    if architecture is None:
        raise UserError(f"--weights {weights}: also give --architecture; only an exported stage's folder names its own")
    size = read_architecture(architecture)["vision_cfg"].get("image_size") or 64
    return ModelConfig(architecture=architecture, image_size=(size, size) if isinstance(size, int) else tuple(size))


def _export_model(folder: Path) -> tuple[ModelConfig, list[str] | None]:
    """Settings and word list of an exported stage.

    Raises:
        UserError: there is no manifest of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        settings = manifest["model"]
        if settings.get("word_gru"):
            settings["word_gru"]["dictionary"] = str(folder)
        return ModelConfig.model_validate(settings), manifest["words"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--weights: {folder} is no exported stage of ours ({error})") from error
