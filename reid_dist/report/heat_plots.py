"""Pictures of token maps: each laid over the image that it is of.

Shape suffixes: R rows and S columns of places.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reid_dist.data.tokenizer import Tokenizer
from reid_dist.models.dual_encoder import DualEncoder, Task
from reid_dist.models.row_conv import RowConvTower
from reid_dist.report.figures import new_figure, png
from reid_dist.report.token_maps import Map, attention_map, likeness_map, word_maps

MOST_COLUMNS = 9
_CELL = 1.15  # inches
MOST_WORDS = 23
# They point at nothing that could be found in an image; not drawn where there are other words.
_SMALL_WORDS = frozenset([
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "with", "by", "from", "is", "are", "has", "have", "he",
    "she", "it", "his", "her", "its", "this", "that", "these", "who", "also", "there", "we", "see", "can", "be", "seen",
    "wears", "wearing", "carries", "carrying", "picture",
])  # fmt: skip
_COLOURS = "viridis"  # of growing lightness, told apart by colour-blind people too
COSINE, ATTENTION = "cosine", "share of the attention"


@dataclass(frozen=True)
class Panel:
    """One image of a picture.

    Attributes:
        image: at the model's size.
        label: one short line above it.
        map_RS: laid over it; None: the plain image.
    """

    image: Image.Image
    label: str
    map_RS: Map | None = None


@dataclass(frozen=True)
class Strip:
    """Images that share one scale of colours, from the least to the greatest value of all of their maps.

    Attributes:
        panels: from left to right.
        unit: of the values.
    """

    panels: Sequence[Panel]
    unit: str


def word_strip(encoder: DualEncoder, tokenizer: Tokenizer, image: Image.Image, sentence: str) -> Strip:
    """An image, and where in it a model finds a sentence and each word of it.

    Args:
        encoder: one of which `lacks_maps` says nothing; in eval mode.
        tokenizer: its own.
        image: at the model's size.
        sentence: a caption or a query.
    """
    maps = word_maps(encoder, tokenizer, pixels_of(image, encoder), sentence)
    found = list(zip(maps.words, maps.word_RS, strict=True))
    telling = [(word, map_RS) for word, map_RS in found if word not in _SMALL_WORDS] or found
    panels = [Panel(image, "image"), Panel(image, "the sentence", maps.sentence_RS)]
    return Strip([*panels, *(Panel(image, word, map_RS) for word, map_RS in telling[:MOST_WORDS])], COSINE)


def query_strips(
    encoder: DualEncoder, query: Image.Image, answer: Image.Image | None = None, answer_name: str = "answer"
) -> list[Strip]:
    """What a model looks at in a query image, and where an answer is like that query.

    Args:
        encoder: one of which `lacks_maps` says nothing; in eval mode.
        query: at the model's size.
        answer: likewise; None: the query alone.
        answer_name: what it is called.
    """
    pixels = pixels_of(query, encoder)
    # The stripes of a row tower are in the space of its first projection; a ViT has one projection for all tokens.
    task: Task = "t2i" if isinstance(encoder.visual, RowConvTower) else "i2i"
    with torch.inference_mode():
        feature_D = encoder.encode_image(pixels[None], task)[0]
    own = likeness_map(encoder, pixels, feature_D)
    like = [Panel(query, "query"), Panel(query, "like the query", own)]
    if answer is None:
        like = [Panel(query, "image"), Panel(query, "like the whole", own)]
    else:
        map_RS = likeness_map(encoder, pixels_of(answer, encoder), feature_D)
        like += [Panel(answer, answer_name), Panel(answer, "like the query", map_RS)]
    attention = attention_map(encoder, pixels)
    strips = [Strip(like, COSINE)]
    if attention is not None:
        strips.append(Strip([like[0], Panel(query, "attended to", attention)], ATTENTION))
    return strips


def pixels_of(image: Image.Image, encoder: DualEncoder) -> Tensor:
    """An image as the model takes it. Shape: (3, H, W)."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).to(encoder.logit_scale.device)


def draw_strips(title: str, strips: Sequence[tuple[str, Strip]]) -> bytes:
    """A PNG of strips below each other.

    Args:
        title: one line.
        strips: not empty, with a line above each.
    """
    counts = [len(strip.panels) for _, strip in strips]
    columns = max(4, *(math.ceil(count / math.ceil(count / MOST_COLUMNS)) for count in counts))
    rows = [math.ceil(count / columns) for count in counts]
    image = strips[0][1].panels[0].image
    cell = _CELL * image.height / image.width + 0.28
    heights = [count * cell + (0.35 if line else 0.1) for count, (line, _) in zip(rows, strips, strict=True)]
    figure = new_figure(max(7.0, (_CELL + 0.1) * columns + 1.0), 0.4 + sum(heights))
    parts = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=heights)
    for (part,), (line, strip), count in zip(parts, strips, rows, strict=True):
        part.suptitle("\n".join(textwrap.wrap(line, 13 * columns)[:2]), x=0.01, ha="left", fontsize=9)
        _draw_strip(part, part.subplots(count, columns, squeeze=False), strip)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return png(figure)


def _draw_strip(figure: Any, axes: Any, strip: Strip) -> None:
    maps = [panel.map_RS for panel in strip.panels if panel.map_RS is not None]
    low, high = min(float(each.min()) for each in maps), max(float(each.max()) for each in maps)
    shown = None
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, strip.panels, strict=False):
        shown = _draw_panel(axis, panel, low, high) or shown
    figure.colorbar(shown, ax=list(axes.flat), label=strip.unit, pad=0.01, aspect=30, fraction=0.03)


def _draw_panel(axis: Any, panel: Panel, low: float, high: float) -> Any:
    """Draws it; returns what has the scale of colours, None of a plain image."""
    axis.set_title(panel.label[:18], fontsize=9, loc="center")
    if panel.map_RS is None:
        axis.imshow(panel.image)
        return None
    # Without colours, the image cannot be mistaken for the map.
    axis.imshow(panel.image.convert("L"), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, panel.image.width - 0.5, panel.image.height - 0.5, -0.5)
    return axis.imshow(
        panel.map_RS, cmap=_COLOURS, vmin=low, vmax=high, alpha=0.6, extent=extent, interpolation="nearest"
    )
