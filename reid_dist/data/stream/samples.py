"""Batches of image-text pairs out of streams.

Legend: B rows of a micro-batch, L tokens, C channels, H height, W width.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from reid_dist.data.bad_samples import BadSamples
from reid_dist.data.batch_memory import image_buffer
from reid_dist.data.cache import Size
from reid_dist.data.sample import Sample, content_digest
from reid_dist.data.stream.reader import LaneTar
from reid_dist.data.stream.source import Pair, StreamSource
from reid_dist.data.tokenizer import Tokenizer, mask_words
from reid_dist.data.training_samples import Batch
from reid_dist.data.transforms import Augment, Pixels, decode_into, sample_rng
from reid_dist.errors import UserError

IntArray = npt.NDArray[np.int64]

# Streams of a pair's random numbers.
_AUGMENT, _CAPTION, _MASK = 0, 1, 1 << 32


class StreamSamples:
    """What streams read, and how a micro-batch is made of pairs.

    Images of tars that other software made are taken as they are stored: EXIF orientation is not looked at, as in
    open_clip. `python -m shards.write` applies it.

    Attributes:
        tars: the tars of all sources with their numbers.
        num_samples: training samples of all sources; None when a source was not counted.
        excluded: training samples left out because of exclusions.

    Args:
        sources: in an order that belongs to the run.
        image_size: (height, width).
        tokenizer: None leaves captions out: `token_BL` is then zeros with L = 1.
        augment: None leaves images as they are.
        mask_probability: share of the words of a caption that are masked for the model to guess; 0 is none.

    Raises:
        UserError: no sources, samples without captions where they are needed, or an augmentation that does not fit the
            size.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        image_size: Size,
        tokenizer: Tokenizer | None = None,
        augment: Augment | None = None,
        mask_probability: float = 0.0,
    ) -> None:
        if not sources:
            raise UserError("data.train: nothing to stream; name shard sets or tars")
        if augment is not None and augment.pad >= min(image_size):
            raise UserError(f"augmentation: pad {augment.pad} is not smaller than the image, {image_size}")
        for source in sources if tokenizer is not None else ():
            if source.uncaptioned:
                raise UserError(
                    f"{source.name}: {source.uncaptioned} of {source.samples} training samples have no caption; this "
                    f"stage needs captions: leave the set out"
                )
        self.sources = list(sources)
        self.image_size = image_size
        self.tokenizer = tokenizer
        # An augmentation that changes nothing would still cost its random numbers, 8 µs an image.
        self.augment = None if augment == Augment(flip=0.0) else augment
        self.mask_probability = mask_probability if tokenizer is not None else 0.0
        listed = [(source, tar) for source in self.sources for tar in source.tars]
        self.tars = [LaneTar(source, tar, number) for number, (source, tar) in enumerate(listed)]
        counts = [source.samples for source in self.sources]
        self.num_samples = None if None in counts else sum(count for count in counts if count is not None)
        self.excluded = sum(source.excluded for source in self.sources)

    def describe(self, sample_id: int) -> str:
        """Names a sample of a batch, for messages."""
        source, tar, _ = self.tars[sample_id >> 32]
        return source.describe(tar, f"number {sample_id & 0xFFFFFFFF}")

    def lanes(self, weighted: bool) -> list[list[LaneTar]]:
        """The tars of each source by itself, or of all together."""
        if not weighted:
            return [self.tars]
        return [[tar for tar in self.tars if tar.source is source] for source in self.sources]

    def batch(
        self, take: Callable[[], Pair], count: int, seed: int, bad: BadSamples, out_BHWC: Pixels | None = None
    ) -> tuple[Batch, list[str]]:
        """Make one micro-batch of the next pairs.

        Args:
            take: gives the next pair.
            count: B.
            seed: of augmentation and choice of captions.
            bad: counts what is bad; others take its place as long as it allows it.
            out_BHWC: memory for the images, which the result is a view of. Shape: (B, H, W, C).

        Returns:
            The batch: each pair is an identity of its own, `pid_B` and `sample_id_B` both hold tar * 2**32 + number
            in the tar. And one line for each bad sample that was met.

        Raises:
            UserError: more samples are bad than allowed, or a tar cannot be read.
        """
        image_BHWC = image_buffer(count, self.image_size).numpy() if out_BHWC is None else out_BHWC
        pairs: list[Pair] = []
        captions: list[str] = []
        messages: list[str] = []
        while len(pairs) < count:
            pair = take()
            try:
                caption = self._fill(pair, seed, image_BHWC[len(pairs)])
            except UserError as error:
                messages.append(str(error))
                bad.add(1, messages[-1:])
                continue
            pairs.append(pair)
            captions.append(caption)
        bad.add(count, ())
        sample_id_B = np.array([(pair.tar << 32) + pair.ordinal for pair in pairs], dtype=np.int64)
        batch = {
            "image_BCHW": torch.from_numpy(image_BHWC).permute(0, 3, 1, 2),
            "token_BL": torch.zeros(count, 1, dtype=torch.int64),
            "pid_B": torch.from_numpy(sample_id_B.copy()),
            "camid_B": torch.full((count,), -1, dtype=torch.int64),
            "sample_id_B": torch.from_numpy(sample_id_B),
        }
        if self.tokenizer is not None:
            batch["token_BL"] = self.tokenizer(captions)
            if self.mask_probability:
                keys = [(seed, pair.visit, number) for pair, number in zip(pairs, sample_id_B.tolist(), strict=True)]
                batch |= self._masked(self.tokenizer, batch["token_BL"].numpy(), keys)
        return batch, messages

    def _fill(self, pair: Pair, seed: int, out_HWC: Pixels) -> str:
        """Put the image into the batch; returns the caption, empty without tokenizer.

        Raises:
            UserError: one line that names tar, key and remedy.
        """
        if pair.problem:
            raise UserError(pair.problem)
        if pair.digests is not None and content_digest(pair.image) != pair.digests[0]:
            raise self._bad(pair, "the image is damaged (its sha256 is not the one in the index)")
        key = (seed, pair.visit, (pair.tar << 32) + pair.ordinal)
        caption = ""
        if self.tokenizer is not None:
            captions = self._captions(pair)
            several = len(captions) > 1
            caption = captions[int(sample_rng(*key, _CAPTION).integers(len(captions)))] if several else captions[0]
        try:
            decode_into(pair.image, out_HWC, "image")
        except UserError:
            # Decoded once more for the message: only a bad image should pay for its name.
            decode_into(pair.image, out_HWC, self._name(pair))
        if self.augment is not None:
            changed = self.augment(out_HWC, sample_rng(*key, _AUGMENT))
            if changed is not out_HWC:
                out_HWC[...] = changed
        return caption

    def _captions(self, pair: Pair) -> list[str]:
        """At least one caption that is not empty."""
        if self.tars[pair.tar].source.ours:
            if pair.digests is not None and content_digest(pair.text) != pair.digests[1]:
                raise self._bad(pair, "the JSON record is damaged (its sha256 is not the one in the index)")
            try:
                captions = Sample.model_validate_json(pair.text).captions
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                place = ".".join(map(str, problem["loc"]))
                raise self._bad(pair, f"the JSON record is damaged ({place}: {problem['msg']})") from None
        else:
            captions = [self._foreign_caption(pair)]
        captions = [caption for caption in captions if caption and not caption.isspace()]
        if not captions:
            raise self._bad(pair, "it has no caption")
        return captions

    def _foreign_caption(self, pair: Pair) -> str:
        try:
            if not pair.is_json:
                return pair.text.decode("utf-8").strip()
            facts = json.loads(pair.text)
        except UnicodeDecodeError:
            raise self._bad(pair, f"its {'.json' if pair.is_json else '.txt'} is not UTF-8 text") from None
        except (ValueError, RecursionError):
            raise self._bad(pair, "its .json is not JSON") from None
        facts = facts if isinstance(facts, dict) else {}
        if {"split", "role", "captions"} <= facts.keys():
            # Its split would not be looked at: a test set could be trained on.
            raise self._bad(pair, "a record of a shard set; in data.train, name the folder with its manifest instead")
        caption = facts.get("caption")
        if caption is not None and not isinstance(caption, str):
            raise self._bad(pair, f'"caption" of its .json is {type(caption).__name__}, not text')
        return (caption or "").strip()

    def _masked(self, tokenizer: Tokenizer, token_BL: IntArray, keys: Sequence[tuple[int, int, int]]) -> Batch:
        rows = [
            mask_words(tokenizer, token_L, sample_rng(*key, _MASK), self.mask_probability)
            for token_L, key in zip(token_BL, keys, strict=True)
        ]
        return {
            "masked_token_BL": torch.from_numpy(np.stack([tokens for tokens, _ in rows])),
            "masked_label_BL": torch.from_numpy(np.stack([labels for _, labels in rows])),
        }

    def _name(self, pair: Pair) -> str:
        source, tar, _ = self.tars[pair.tar]
        return source.describe(tar, pair.key)

    def _bad(self, pair: Pair, problem: str) -> UserError:
        return UserError(f"{self._name(pair)}: {problem}; {self.tars[pair.tar].source.remedy()}")
