"""Where in an image a model finds a word, a sentence or a person: its own tokens compared, nothing trained or inverted.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, N class token and places, P places, R rows and
S columns of places, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from reid_dist.data.tokenizer import OpenClipTokenizer, Tokenizer, WordTokenizer
from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import DualEncoder, Task
from reid_dist.models.patches import find_patches
from reid_dist.models.row_conv import RowConvTower
from reid_dist.models.vit import VitTower

Map = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WordMaps:
    """A sentence in an image.

    Attributes:
        sentence_RS: cosine of the sentence's feature and the token of each place.
        words: the words that the model read, in their order.
        word_RS: for each of them the cosine of its token (the mean of its pieces' tokens) and each place's.
    """

    sentence_RS: Map
    words: list[str]
    word_RS: list[Map]


def lacks_maps(encoder: DualEncoder, tokenizer: Tokenizer | None = None) -> str:
    """Why a model has no such maps, as the end of a sentence; empty: it has.

    Args:
        encoder: any.
        tokenizer: its own, where words are wanted.
    """
    visual = encoder.visual
    if not isinstance(visual, (VitTower, RowConvTower)) or not visual.gives_tokens:
        return f"its image tower ({type(visual).__name__}) has no tokens that belong to places of the image"
    if tokenizer is None:
        return ""
    if not getattr(encoder.text, "gives_tokens", False):
        return f"its text tower ({type(encoder.text).__name__}) gives no tokens"
    if not isinstance(tokenizer, (WordTokenizer, OpenClipTokenizer)) or tokenizer.mask_id < 0:
        return "its tokenizer does not tell which tokens make a word"
    return ""


def require_maps(encoder: DualEncoder, tokenizer: Tokenizer | None, what: str) -> None:
    """Refuses a model without maps.

    Raises:
        UserError: with what is missing.
    """
    reason = lacks_maps(encoder, tokenizer)
    if reason:
        raise UserError(f"{what}: no heat maps: {reason}; they need a ViT or row tower with tokens, such as ViT-B-16")


def word_maps(encoder: DualEncoder, tokenizer: Tokenizer, image_CHW: Tensor, sentence: str) -> WordMaps:
    """Where an image holds what a sentence says.

    Args:
        encoder: one of which `lacks_maps` says nothing; in eval mode.
        tokenizer: its own.
        image_CHW: uint8 of the model's size, on its device.
        sentence: of which the words that the tokenizer knows count.
    """
    token_1L = tokenizer([sentence]).to(image_CHW.device)
    with torch.inference_mode():
        output = encoder(image_CHW[None], token_1L, details=True)
    assert output.image_tokens is not None and output.text_tokens is not None
    place_PD, grid = output.image_tokens[0, 1:], place_grid(encoder, image_CHW)
    words, vectors = [], []
    for word, places in words_of(tokenizer, token_1L[0].cpu().numpy()):
        words.append(word)
        vectors.append(output.text_tokens[0, places].mean(dim=0))
    maps = [_cosine(vector_D, place_PD, grid) for vector_D in vectors]
    return WordMaps(_cosine(output.text_features[0], place_PD, grid), words, maps)


def words_of(tokenizer: Tokenizer, token_L: npt.NDArray[np.int64]) -> list[tuple[str, list[int]]]:
    """The words that a tokenizer knows of a sentence, each with the positions of its tokens."""
    number_L = tokenizer.word_numbers(token_L)
    found = []
    for number in range(int(number_L.max(initial=-1)) + 1):
        places = np.flatnonzero(number_L == number)
        if len(places):
            found.append((tokenizer.spell(token_L[places].tolist()), places.tolist()))
    return found


def likeness_map(encoder: DualEncoder, image_CHW: Tensor, feature_D: Tensor) -> Map:
    """Where an image is like what a feature is of: cosine with the token of each place.

    Args:
        encoder: one with image tokens, in eval mode.
        image_CHW: uint8 of the model's size, on its device.
        feature_D: of another image, or of a sentence.
    """
    return _cosine(feature_D, _image_tokens(encoder, image_CHW)[0, 1:], place_grid(encoder, image_CHW))


def attention_map(encoder: DualEncoder, image_CHW: Tensor, task: Task = "i2i") -> Map | None:
    """How much the class token attends to each place in the last block, the mean of its heads; None without a block.

    The sum is at most 1: what is missing goes to the class tokens themselves and to prompts.

    Args:
        encoder: one with image tokens, in eval mode.
        image_CHW: uint8 of the model's size, on its device.
        task: image queries have a class token of their own in some models.
    """
    visual = encoder.visual
    if not isinstance(visual, VitTower):
        return None
    attention = getattr(visual.transformer.resblocks[-1], "attn", None)
    if not isinstance(attention, nn.MultiheadAttention):
        return None
    grid = place_grid(encoder, image_CHW)
    with _weights_of(attention) as seen:
        _image_tokens(encoder, image_CHW)
    (weight_NN,) = seen
    row = 1 if task == "i2i" and encoder.has_i2i_token else 0
    return _as_map(weight_NN[row, -math.prod(grid) :], grid)


@contextmanager
def _weights_of(attention: nn.MultiheadAttention) -> Iterator[list[Tensor]]:
    """Collects the weights of an attention, which asks for none itself. Shape of each: (N, N)."""
    seen: list[Tensor] = []

    def look(module: nn.MultiheadAttention, given: tuple[Any, ...], settings: dict[str, Any]) -> None:
        handle.remove()  # the call below would come here again
        _, weight_1NN = module(*given, **{**settings, "need_weights": True, "average_attn_weights": True})
        seen.append(weight_1NN[0])

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _image_tokens(encoder: DualEncoder, image_CHW: Tensor) -> Tensor:
    """Tokens of an image; the sentence beside it is empty. Shape: (1, N, D)."""
    nothing_1L = torch.zeros(1, encoder.text_shape.context_length, dtype=torch.int64, device=image_CHW.device)
    with torch.inference_mode():
        tokens_1ND: Tensor | None = encoder(image_CHW[None], nothing_1L, details=True).image_tokens
    assert tokens_1ND is not None
    return tokens_1ND


def place_grid(encoder: DualEncoder, image_CHW: Tensor) -> tuple[int, int]:
    """(rows, columns) of the places that tokens stand for."""
    if isinstance(encoder.visual, RowConvTower):
        return encoder.visual.rows, 1
    patches = find_patches(encoder.visual)
    assert patches is not None
    return patches.grid((image_CHW.shape[1], image_CHW.shape[2]))


def _cosine(vector_D: Tensor, place_PD: Tensor, grid: tuple[int, int]) -> Map:
    return _as_map(nn.functional.cosine_similarity(vector_D.float()[None], place_PD.float(), dim=1), grid)


def _as_map(value_P: Tensor, grid: tuple[int, int]) -> Map:
    found: Map = value_P.float().cpu().numpy().reshape(grid)
    return found
