"""The training samples of one or several shard sets, and how a micro-batch is made of them.

Legend: B rows of a micro-batch, N training items, R spare ones, L tokens, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from reid_dist.data.batch_memory import image_buffer
from reid_dist.data.cache import ImageCache, Images, Size
from reid_dist.data.exclude import NOTHING, Exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import NO_LABEL, MaskForm, Tokenizer, mask_words
from reid_dist.data.training_items import Items, TrainingItems
from reid_dist.data.transforms import Augment, Pixels, sample_rng
from reid_dist.data.units import IntArray
from reid_dist.errors import UserError

# image_BCHW uint8 (any strides), token_BL, pid_B, camid_B and sample_id_B int64; masked_token_BL and masked_label_BL
# int64 where words are masked. Where captioned sets are mixed with others captioned_B (bool) tells the rows with a
# caption, and token_BL and the masked ones hold these rows alone, in their order.
Batch = dict[str, torch.Tensor]

# Streams of a sample's random numbers: 2 * repetition for its augmentation, one more for its caption, and these for its
# masked words. A spare adds a number of the sample that it stands for, so that two of them never look the same.
_MASK_STREAM = 1 << 32
_SPARE_STREAM = 1 << 33


@dataclass(frozen=True)
class BatchTask:
    """One micro-batch to make.

    Attributes:
        seed: of the run's data.
        epoch_B: of each row; with the seed and the sample number it decides augmentation and caption. Shape: (B,).
        sample_id_B: sample numbers. Shape: (B,).
        occurrence_B: how often each came before in its step, see `sampler.occurrences`. Shape: (B,).
        spare_BR: what may stand for a sample that cannot be read, see `sampler.Step`. Shape: (B, R).
        place: in the memory that the loader shares with its workers; -1 is none.
    """

    seed: int
    epoch_B: IntArray
    sample_id_B: IntArray
    occurrence_B: IntArray
    spare_BR: IntArray = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    place: int = -1


class _Arrays(NamedTuple):
    """A micro-batch while it is made."""

    image_BHWC: Pixels
    token_BL: IntArray
    masked_token_BL: IntArray | None
    masked_label_BL: IntArray | None

    def text(self) -> dict[str, IntArray]:
        """Those of the captions, by their names in a batch."""
        named = {name: getattr(self, name) for name in ("token_BL", "masked_token_BL", "masked_label_BL")}
        return {name: value for name, value in named.items() if value is not None}


class TrainingSamples(TrainingItems):
    """The training items of several sets, and the making of batches from them.

    Attributes:
        partly_captioned: captioned sets are mixed with others, see `Batch`.

    Args:
        shards: sets, in an order that belongs to the run.
        image_size: (height, width).
        tokenizer: None leaves captions out: `token_BL` is then zeros with L = 1.
        augment: None leaves images as they are.
        cache: keeps decoded images and tokens.
        allow_uncaptioned: with a tokenizer, sets without captions may stand beside others instead of being refused.
        exclude: see `TrainingItems`.
        mask_probability: share of the words of a caption that are masked for the model to guess; 0 is none.
        mask_form: see `tokenizer.mask_words`.
        items: see `TrainingItems`.

    Raises:
        UserError: no training rows, missing captions, no mask token, or two sets that share pid strings.
    """

    def __init__(
        self,
        shards: Sequence[ShardSet],
        image_size: Size,
        tokenizer: Tokenizer | None = None,
        augment: Augment | None = None,
        cache: ImageCache | None = None,
        allow_uncaptioned: bool = False,
        exclude: Exclusions = NOTHING,
        mask_probability: float = 0.0,
        mask_form: MaskForm = "words",
        items: Items = "images",
    ) -> None:
        if augment is not None and augment.pad >= min(image_size):
            raise UserError(f"augmentation: pad {augment.pad} is not smaller than the image, {image_size}")
        if mask_probability and (tokenizer is None or tokenizer.mask_id < 0):
            raise UserError(
                "masking of words: this stage has no captions, or its tokenizer no mask token; give a vocabulary file "
                "or leave masking off"
            )
        super().__init__(shards, items, exclude)
        self.image_size = image_size
        self.tokenizer = tokenizer
        # An augmentation that changes nothing would still cost its random numbers, 8 µs an image.
        self.augment = None if augment == Augment(flip=0.0) else augment
        self.mask_probability = mask_probability
        self.mask_form = mask_form
        self.images = [Images(each, image_size, cache) for each in self.shards]
        self._tokens: dict[int, npt.NDArray[np.int32]] | None = {} if cache is not None else None
        if tokenizer is not None:
            self.require_captions(allow_uncaptioned)
        self.partly_captioned = tokenizer is not None and not bool(self.captioned_S.all())

    def batch(self, task: BatchTask, out_BHWC: Pixels | None = None, bad: list[str] | None = None) -> Batch:
        """Make one micro-batch.

        Args:
            task: what to make.
            out_BHWC: memory for the images, which the result is a view of. Shape: (B, H, W, C).
            bad: one line is added for each sample that cannot be read, and a spare one takes its place; None stops at
                the first.

        Raises:
            UserError: an image does not decode or a record is damaged, and there is nothing in its place.
        """
        # Kept as a tensor: torch sends the memory that it made itself to another process without copying it.
        image_BHWC = (
            torch.from_numpy(out_BHWC) if out_BHWC is not None else image_buffer(len(task.sample_id_B), self.image_size)
        )
        arrays = self._arrays(image_BHWC.numpy())
        sample_id_B, known = task.sample_id_B.copy(), set[int]()
        rows = zip(task.epoch_B.tolist(), task.sample_id_B.tolist(), task.occurrence_B.tolist(), strict=True)
        for place, (epoch, sample_id, repeat) in enumerate(rows):
            try:
                self._fill(arrays, place, (task.seed, epoch, sample_id), 2 * repeat)
            except UserError as error:
                if bad is None:
                    raise
                bad.append(str(error))
                known.add(sample_id)
                sample_id_B[place] = self._replace(arrays, place, task, known, str(error))
        batch = {
            "image_BCHW": image_BHWC.permute(0, 3, 1, 2),
            "pid_B": torch.from_numpy(self.pid_N[sample_id_B]),
            "camid_B": torch.from_numpy(self.camid_N[sample_id_B]),
            "sample_id_B": torch.from_numpy(sample_id_B),
        }
        text = {name: torch.from_numpy(value) for name, value in arrays.text().items()}
        if self.partly_captioned:
            captioned_B = torch.from_numpy(self._captioned(sample_id_B))
            text = {name: value[captioned_B] for name, value in text.items()} | {"captioned_B": captioned_B}
        return batch | text

    def _captioned(self, sample_id_B: IntArray) -> npt.NDArray[np.bool_]:
        """Which items are of captioned sets."""
        captioned_B: npt.NDArray[np.bool_] = self.captioned_S[self.set_N[sample_id_B]]
        return captioned_B

    def _arrays(self, image_BHWC: Pixels) -> _Arrays:
        shape = len(image_BHWC), self.tokenizer.context_length if self.tokenizer is not None else 1
        token_BL = np.zeros(shape, dtype=np.int64)
        if not self.mask_probability:
            return _Arrays(image_BHWC, token_BL, None, None)
        return _Arrays(image_BHWC, token_BL, token_BL.copy(), np.full(shape, NO_LABEL))

    def _fill(self, arrays: _Arrays, place: int, key: tuple[int, int, int], stream: int) -> None:
        """Make one row of a batch; the key, (seed, epoch, sample number), and the stream decide all that is random."""
        sample_id = key[2]
        images, row = self.images[self.set_N[sample_id]], int(self.row_N[sample_id])
        out_HWC = arrays.image_BHWC[place]
        if self.augment is None:
            images.into(row, out_HWC)
        elif images.cached:
            out_HWC[...] = self.augment(images(row), sample_rng(*key, stream))
        else:
            images.into(row, out_HWC)
            changed = self.augment(out_HWC, sample_rng(*key, stream))
            if changed is not out_HWC:
                out_HWC[...] = changed
        if self.tokenizer is None:
            return
        # From here on only what can be read is written: nothing of a bad sample stays in its row.
        token_L = self._caption(key, stream + 1)
        if token_L is None:
            return
        arrays.token_BL[place] = token_L
        if arrays.masked_token_BL is not None and arrays.masked_label_BL is not None:
            rng = sample_rng(*key, stream + _MASK_STREAM)
            masked = mask_words(self.tokenizer, arrays.token_BL[place], rng, self.mask_probability, self.mask_form)
            arrays.masked_token_BL[place], arrays.masked_label_BL[place] = masked

    def _replace(self, arrays: _Arrays, place: int, task: BatchTask, known: set[int], reason: str) -> int:
        """Fill a row with the first spare sample that is not bad as well; returns its number.

        Args:
            arrays: the batch.
            place: the row.
            task: names the spares.
            known: bad samples of this batch; more may be added.
            reason: what is wrong with the row's own sample.
        """
        epoch, spares = int(task.epoch_B[place]), task.spare_BR[place].tolist()
        stream = 2 * int(task.occurrence_B[place]) + (int(task.sample_id_B[place]) + 1) * _SPARE_STREAM
        # Never of the other kind: all ranks have the same number of captions.
        alike = self._captioned(task.spare_BR[place]) == self._captioned(task.sample_id_B[place : place + 1])
        for spare, fits in zip(spares, alike.tolist(), strict=True):
            if spare in known or not (fits or self.tokenizer is None):
                continue
            try:
                self._fill(arrays, place, (task.seed, epoch, spare), stream)
                return int(spare)
            except UserError:
                known.add(spare)
        raise UserError(f"{reason}; {len(spares)} samples that could stand for it are bad as well")

    def captions(self, sample_id: int) -> list[str]:
        """The captions of one item: all of its image, or the one that it is paired with.

        Raises:
            UserError: the record is damaged.
        """
        shards, row = self.shards[int(self.set_N[sample_id])], int(self.row_N[sample_id])
        captions, number = shards.sample(row).captions, int(self.caption_N[sample_id])
        if number >= len(captions):
            raise UserError(f"{shards.describe(row)}: it has fewer captions than the index says; index the set again")
        return captions if number < 0 else captions[number : number + 1]

    def _caption(self, key: tuple[int, int, int], stream: int) -> IntArray | None:
        """Tokens of one caption of an item, drawn where it has several; None where it has none. Shape: (L,)."""
        if self._tokens is None:
            captions = self.captions(key[2])
            return self._tokenize([captions[_choice(len(captions), key, stream)]])[0] if captions else None
        row_CL = self._tokens.get(key[2])
        if row_CL is None:
            row_CL = self._tokens[key[2]] = self._tokenize(self.captions(key[2])).astype(np.int32)
        token_L: IntArray | None = row_CL[_choice(len(row_CL), key, stream)] if len(row_CL) else None
        return token_L

    def _tokenize(self, captions: Sequence[str]) -> IntArray:
        """Shape: (captions, L)."""
        assert self.tokenizer is not None
        tokens: IntArray = self.tokenizer(captions).numpy() if captions else np.empty((0, 0), dtype=np.int64)
        return tokens


def _choice(count: int, key: tuple[int, int, int], stream: int) -> int:
    """A number below `count`; no random numbers are made where there is no choice."""
    return int(sample_rng(*key, stream).integers(count)) if count > 1 else 0
