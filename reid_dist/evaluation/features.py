"""Features of images and captions, extracted on all ranks.

Every rank takes its own blocks of images and captions, each sample once and without padding; after one
exchange all ranks hold the same features in the order of the rows. The blocks do not depend on the number of
ranks, and neither does any bit of a result, as long as the encoder computes a block alike on every rank. All
ranks enter a function of this file or none; a failure on one rank is raised on all of them.

Shape suffixes: N images, M captions, D feature, B block, L tokens, C channels, H height, W width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from reid_dist.data.cache import ImageCache
from reid_dist.data.loader import caption_batches, caption_table, eval_batches
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.distributed import all_gather_object, all_gather_ragged, rank, world_size
from reid_dist.errors import UserError

CAPTIONS_PER_IMAGE_BLOCK = 4  # a sentence costs less than an image


class Encoder(Protocol):
    """What evaluation calls; usually a Stage. An nn.Module runs in eval mode and is put back after."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """uint8 images to features [B, D]."""

    def encode_text(self, token_BL: Tensor) -> Tensor:
        """Token ids to features [B, D]."""


@dataclass(frozen=True)
class Features:
    """fp32 L2-normalised features with labels, identical on every rank, in the order of the rows asked for.

    Attributes:
        image_ND: on the device.
        image_pid_N: position in the shard set's identities.
        camid_N: camera, -1 = unknown.
        role_N: position in ROLES.
        row_N: row of the shard set.
        text_MD: None when no captions were asked for.
        text_pid_M: identity of the image that the caption belongs to.
        text_image_M: position of that image in row_N.
        captions: the M sentences.
    """

    image_ND: Tensor
    image_pid_N: Tensor
    camid_N: Tensor
    role_N: Tensor
    row_N: Tensor
    text_MD: Tensor | None
    text_pid_M: Tensor
    text_image_M: Tensor
    captions: list[str]


@contextmanager
def evaluating(encoder: object) -> Iterator[None]:
    """Inference mode, and eval mode for every module of the encoder; each gets its own mode back."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _raise_together(problem: Exception | None, width: int) -> int:
    """All ranks raise what one of them met; returns the width D, which a rank without a block does not know."""
    states = all_gather_object((None if problem is None else str(problem), width))
    if problem is not None and not isinstance(problem, UserError):
        raise problem
    messages = [message for message, _ in states if message is not None]
    if messages:
        raise UserError(messages[0])
    return max(int(found) for _, found in states)


class _Encoded(NamedTuple):
    """What this rank encoded: positions and features of its blocks."""

    positions: list[Tensor]
    features: list[Tensor]
    width: int  # D, on a rank without a block too


def _encode_blocks(
    blocks: Iterable[tuple[Rows, Tensor]], encode: Callable[[Tensor], Tensor], device: torch.device
) -> _Encoded:
    """Encodes this rank's blocks.

    Args:
        blocks: positions [B] and encoder input of each block.
        encode: input to features.
        device: where to compute.
    """
    positions, parts, problem = [], [], None
    try:
        for position_B, value in blocks:
            feature_BD = encode(value.to(device, non_blocking=True)).float()
            positions.append(torch.from_numpy(position_B))
            parts.append(nn.functional.normalize(feature_BD, dim=1))
    except Exception as error:
        problem = error
    return _Encoded(positions, parts, _raise_together(problem, parts[0].shape[1] if parts else 0))


def _gathered(own: _Encoded, count: int, device: torch.device) -> Tensor:
    """Puts the blocks of all ranks in place; in memory they stand at most twice, and the other ranks' once more.

    Args:
        own: emptied.
        count: positions of all ranks together.
        device: of the result.

    Returns:
        fp32 L2-normalised [count, D].
    """
    own_N = torch.cat([torch.zeros(0, dtype=torch.int64), *own.positions])
    places = all_gather_ragged(own_N.to(device))
    if not torch.equal(torch.cat(places).sort().values, torch.arange(count, device=device)):
        raise RuntimeError("evaluation: the blocks of the ranks do not cover every sample exactly once")
    own_ND = torch.cat([torch.zeros(0, own.width, device=device), *own.features])
    own.features.clear()
    out_ND = torch.empty(count, own.width, device=device)
    for place_N, part_ND in zip(places, all_gather_ragged(own_ND), strict=True):
        out_ND[place_N] = part_ND
    return out_ND


def _check_finite(feature_ND: Tensor, name: Callable[[int], str]) -> None:
    """Raises on all ranks alike, as all hold the same features."""
    broken = (~feature_ND.isfinite().all(dim=1)).nonzero().flatten()
    if len(broken):
        raise UserError(
            f"evaluation: the features of {name(int(broken[0]))} hold nan or inf ({len(broken)} of "
            f"{len(feature_ND)}); the model diverged or overflowed: lower optimizer.lr or use precision fp32"
        )


def extract(
    encoder: Encoder,
    shards: ShardSet,
    rows: Rows,
    size: tuple[int, int],
    tokenizer: Tokenizer | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    cache: ImageCache | None = None,
) -> Features:
    """Features of some rows and, given a tokenizer, of all their captions. A collective: every rank calls it.

    Args:
        encoder: its features may have any float dtype and length; they are L2-normalised in fp32.
        shards: one set.
        rows: rows of the set, in the order wanted.
        size: (height, width) of the encoder's input.
        tokenizer: None leaves the captions out.
        batch_size: images of a block; a block of captions is four times as long.
        device: of the encoder.
        cache: decoded images kept by the caller.

    Raises:
        UserError: no rows, an image does not decode (on any rank), or the encoder produced nan or inf.
    """
    if len(rows) == 0:
        raise UserError(f"evaluation: {shards.shown}: no images in the rows asked for; check the split and the roles")
    device = torch.device(device)
    images = (
        (place, batch["image_BCHW"])
        for place, batch in eval_batches(shards, rows, size, batch_size, rank(), world_size(), cache)
    )
    blocks = -(-len(rows) // (batch_size * world_size()))
    captions, owner_M = caption_table(shards, rows) if tokenizer is not None else ([], np.zeros(0, np.int64))
    texts = None
    with evaluating(encoder):
        encoded = _encode_blocks(_progress(images, blocks, shards.name), encoder.encode_image, device)
        if tokenizer is not None and captions:
            length = CAPTIONS_PER_IMAGE_BLOCK * batch_size
            batches = caption_batches(captions, tokenizer, length, rank(), world_size())
            texts = _encode_blocks(batches, encoder.encode_text, device)
    # Outside inference mode, whose tensors are no ordinary ones.
    image_ND = _gathered(encoded, len(rows), device)
    text_MD = None if texts is None else _gathered(texts, len(captions), device)
    _check_finite(image_ND, lambda i: shards.describe(int(rows[i])))
    if text_MD is not None:
        _check_finite(text_MD, lambda i: f'{shards.shown}, caption "{captions[i][:60]}"')
    index = shards.index[rows]

    def labels(value: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return torch.from_numpy(value.astype(np.int64)).to(device)

    return Features(
        image_ND=image_ND,
        image_pid_N=labels(index["pid"]),
        camid_N=labels(index["camid"]),
        role_N=labels(index["role"]),
        row_N=labels(rows),
        text_MD=text_MD,
        text_pid_M=labels(index["pid"][owner_M]),
        text_image_M=labels(owner_M),
        captions=captions,
    )


def _progress(blocks: Iterable[tuple[Rows, Tensor]], total: int, name: str) -> Iterable[tuple[Rows, Tensor]]:
    quiet = rank() != 0 or not sys.stderr.isatty()
    return tqdm(
        blocks,
        total=total,
        desc=f"features of {name}",
        unit="batch",
        disable=quiet,
        leave=False,
    )
