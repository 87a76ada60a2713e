"""Features of a query: a sentence, a picture, or both together.

Shape suffixes: D features.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from reid_dist.errors import UserError
from reid_dist.search.index import Kind, PhotoIndex, Vector
from reid_dist.trained import TrainedModel, load


def load_model(index: PhotoIndex, path: str | Path | None = None) -> TrainedModel:
    """The model that an index was made with.

    Args:
        index: whose vectors the queries are compared with.
        path: where it is; None: where it was when the index was made.

    Raises:
        UserError: there is none, or it is another one.
    """
    model = load(index.model_path if path is None else path)
    if model.digest != index.digest:
        raise UserError(
            f"{model.folder}: not the model that {index.folder} was made with (sha256 {model.digest[:12]}, not"
            f" {index.digest[:12]}); name the right one with --model or build the index again"
        )
    return model


def kind_of(text: str | None, image: object | None) -> Kind:
    """What a query consists of."""
    return "both" if text is not None and image is not None else "text" if text is not None else "image"


def combine(
    model: TrainedModel, text: str | None = None, image: Image.Image | str | Path | None = None, weight: float = 0.5
) -> Vector:
    """Features of a query, of length 1. Shape: (D,).

    Args:
        model: of the index.
        text: a sentence about the person.
        image: a picture of the person, or its file.
        weight: of the sentence where there are both, 0 to 1; the picture has the rest.

    Raises:
        UserError: neither is given, the sentence is empty, the picture does not decode, the weight is outside 0 to 1.
    """
    if text is None and image is None:
        raise UserError("query: empty; give a sentence, a picture or both")
    if not 0 <= weight <= 1:
        raise UserError(f"weight {weight}: must be from 0 (only the picture) to 1 (only the sentence)")
    if text is not None and not text.strip():
        raise UserError("query: the sentence is empty; describe a person, or give a picture")
    feature_D = np.zeros(model.features, dtype=np.float32)
    share = {"both": weight, "text": 1.0, "image": 0.0}[kind_of(text, image)]
    if text is not None:
        feature_D += share * model.encode_text(text)[0].cpu().numpy()
    if image is not None:
        feature_D += (1 - share) * model.encode_image(image)[0].cpu().numpy()
    length = float(np.linalg.norm(feature_D))
    if length < 1e-6:
        raise UserError("query: sentence and picture cancel out; change the weight")
    return np.asarray(feature_D / length, dtype=np.float32)
