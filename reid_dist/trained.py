"""A trained model, from the files of its run alone: `from reid_dist import load`.

Shape suffixes: N images or sentences, B of a batch, D features, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from reid_dist.checkpoint.portable import ARCHITECTURE_FILE, read_export
from reid_dist.config import ModelConfig
from reid_dist.data.pictures import read_picture
from reid_dist.data.tokenizer import OpenClipTokenizer, Tokenizer, WordTokenizer
from reid_dist.data.transforms import Pixels
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder, Task
from reid_dist.models.weights import MANIFEST_FILE, load_weights

Picture = str | Path | Image.Image | npt.NDArray[np.uint8]


class TrainedModel:
    """One encoder for images of people and sentences about them.

    Attributes:
        encoder: in evaluation mode, on the device.
        tokenizer: of sentences.
        image_size: height and width that images are brought to.
        folder: the export that it was loaded from.
        manifest: what that says of itself: stage, steps, versions ...
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Loads an export; `load` finds it.

        Raises:
            UserError: it is damaged, or was not written by this program.
        """
        manifest = read_export(folder, verify=True)
        if manifest is None:
            raise UserError(f"{folder}: no exported model; name the folder of a run, of a stage, or its export")
        self.folder, self.manifest, self.device = folder, manifest, torch.device(device)
        config, words = _description(folder, manifest)
        self.image_size = config.image_size
        self.encoder = build_dual_encoder(config)
        report = load_weights(self.encoder, str(folder), config.architecture, config.image_size)
        if report.missing or report.unexpected or report.resized:
            raise UserError(f"{folder}: the weights are not those of the model that its manifest describes: {report}")
        self.encoder.to(self.device).eval()
        self.tokenizer = _tokenizer(self.encoder, config, words)

    @property
    def features(self) -> int:
        """D."""
        return self.encoder.features

    @property
    def digest(self) -> str:
        """Hash of the weights, as hexadecimal digits."""
        digest: str = self.manifest["sha256"]
        return digest

    def encode_image(self, images: Picture | Sequence[Picture], task: Task = "t2i", batch_size: int = 64) -> Tensor:
        """Features of images, to compare with those of sentences, or with `task="i2i"` with those of other images.

        Most models have one kind of image features; those with two class tokens (HPL) have two.

        Args:
            images: files (upright as their EXIF says), PIL images or RGB arrays of uint8 (height, width, 3); one or
                many.
            task: what they are compared with.
            batch_size: images encoded at a time.

        Returns:
            fp32 of length 1, on the device. Shape: (N, D).

        Raises:
            UserError: an image does not decode, or the features hold nan or inf.
        """
        listed = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else list(images)
        encoder = self.encoder.for_task(task)

        def encode(part: Sequence[Picture]) -> Tensor:
            image_BHWC = np.stack([_pixels(image, self.image_size) for image in part])
            return encoder.encode_image(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2).to(self.device))

        return self._encoded(listed, encode, batch_size)

    def encode_text(self, sentences: str | Sequence[str], batch_size: int = 256) -> Tensor:
        """Features of sentences; of one that is too long for the model only the first words count.

        Args:
            sentences: one or many.
            batch_size: sentences encoded at a time.

        Returns:
            fp32 of length 1, on the device. Shape: (N, D).

        Raises:
            UserError: an empty sentence, or the features hold nan or inf.
        """
        listed = [sentences] if isinstance(sentences, str) else list(sentences)
        if not all(sentence.strip() for sentence in listed):
            raise UserError("text: a sentence is empty; describe a person")

        def encode(part: Sequence[str]) -> Tensor:
            return self.encoder.encode_text(self.tokenizer(part).to(self.device))

        return self._encoded(listed, encode, batch_size)

    def is_cut(self, sentence: str) -> bool:
        """Whether a sentence is longer than the model reads: neither its last word nor anything after it counts."""
        words = sentence.split()[:-1]
        if not words:
            return False
        whole_L, shorter_L, longer_L = self.tokenizer([sentence, " ".join(words), f"{sentence} {sentence}"])
        return torch.equal(whole_L, shorter_L) and torch.equal(whole_L, longer_L)

    def _encoded(self, listed: Sequence[Any], encode: Callable[[Sequence[Any]], Tensor], batch_size: int) -> Tensor:
        parts = [torch.zeros(0, self.features, device=self.device)]
        with torch.inference_mode():
            for start in range(0, len(listed), batch_size):
                feature_BD = encode(listed[start : start + batch_size]).float()
                if not feature_BD.isfinite().all():
                    raise UserError(f"{self.folder}: the model gives features with nan or inf; it diverged in training")
                parts.append(nn.functional.normalize(feature_BD, dim=1))
        return torch.cat(parts).clone()  # an ordinary tensor again


def load(path: str | Path, device: torch.device | str | None = None) -> TrainedModel:
    """A trained model.

    Args:
        path: folder of a run (its last finished stage counts), of one of its stages, or an export.
        device: where it runs; none: a GPU where there is one.

    Raises:
        UserError: no model is there, or it is damaged.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainedModel(find_export(Path(path)), device)


def find_export(path: Path) -> Path:
    """The export in a folder: of a run's last finished stage, of a stage, or the folder itself.

    Raises:
        UserError: there is none.
    """
    recipe = path / "config.yaml"
    stages: list[str] = []
    if recipe.is_file():
        try:
            stages = [str(stage["name"]) for stage in yaml.safe_load(recipe.read_text())["stages"]]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise UserError(f"{recipe}: not the settings of a run; name the folder of a stage") from error
    places = [*(path / stage / "export" for stage in reversed(stages)), path / "export", path]
    for place in places:
        if read_export(place) is not None:
            return place
    raise UserError(f"{path}: no exported model; name the folder of a run, of a stage, or its export")


def _description(folder: Path, manifest: dict[str, Any]) -> tuple[ModelConfig, list[str] | None]:
    """How to build the encoder, and the words of its tokenizer.

    What the run read from files elsewhere is in the export.

    Raises:
        UserError: the manifest says it not, or wrongly.
    """
    path = folder / MANIFEST_FILE
    try:
        settings, words = dict(manifest["model"]), manifest["words"]
        if (folder / ARCHITECTURE_FILE).is_file():
            settings["architecture"] = str(folder / ARCHITECTURE_FILE)
        if settings.get("word_gru") is not None:
            settings["word_gru"] = {**settings["word_gru"], "dictionary": folder}
        config = ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("model", *first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg']}; export the run again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not describe a model ({error!r}); export the run again") from None
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise UserError(f"{path}: words: not a list of words; export the run again")
    return config, words


def _tokenizer(encoder: DualEncoder, config: ModelConfig, words: list[str] | None) -> Tokenizer:
    shape = encoder.text_shape
    if words:
        return WordTokenizer(words, shape.context_length, shape.vocab_size, framed=config.word_gru is None)
    return OpenClipTokenizer(config.architecture, shape.context_length, shape.vocab_size)


def _pixels(image: Picture, size: tuple[int, int]) -> Pixels:
    """RGB at the size of the model. Shape: (height, width, 3).

    Raises:
        UserError: a file that is no image, or above a cap of `data.pictures`.
        ValueError: an array that is none.
    """
    if isinstance(image, (str, Path)):
        image = read_picture(Path(image), size)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image must be uint8 of shape (height, width, 3), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    return np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC))
