"""The training samples of one or several shard sets, and how a micro-batch is made of them.

Legend: B rows of a micro-batch, N training samples, L tokens, C channels, H height, W width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reid_dist.data.cache import ImageCache, Images, Size
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.data.transforms import Augment, sample_rng
from reid_dist.errors import UserError

# image_BCHW uint8, token_BL int64, pid_B, camid_B and sample_id_B int64.
Batch = dict[str, torch.Tensor]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchTask:
    """One micro-batch to make.

    Attributes:
        seed: of the run's data.
        epoch: with the seed and the sample number it decides augmentation and caption.
        sample_id_B: sample numbers. Shape: (B,).
        occurrence_B: how often each came before in its step, see `sampler.occurrences`. Shape: (B,).
    """

    seed: int
    epoch: int
    sample_id_B: IntArray
    occurrence_B: IntArray


class TrainingSamples:
    """The training rows of several sets as one numbered list, and the making of batches from them.

    Identities are numbered by their sorted pid strings over all sets, cameras of different sets are kept apart.

    Attributes:
        excluded: number of samples left out because of `exclude`.
        identities: pid strings; `pid_N` points into them.
        set_N: which of the sets each sample is from. Shape: (N,).
        row_N: its row there. Shape: (N,).
        pid_N: its identity. Shape: (N,).
        camid_N: its camera, -1 where unknown. Shape: (N,).

    Args:
        shards: sets, in an order that belongs to the run.
        image_size: (height, width).
        tokenizer: None leaves captions out: `token_BL` is then zeros with L = 1.
        augment: None leaves images as they are.
        cache: keeps decoded images and tokens.
        allow_uncaptioned: with a tokenizer, samples without captions get a row of zeros instead of being refused.
        exclude: pid strings whose samples are left out, see `exclude.read_exclusions`; others do no harm.

    Raises:
        UserError: no training rows, missing captions, or two sets that share pid strings.
    """

    def __init__(
        self,
        shards: Sequence[ShardSet],
        image_size: Size,
        tokenizer: Tokenizer | None = None,
        augment: Augment | None = None,
        cache: ImageCache | None = None,
        allow_uncaptioned: bool = False,
        exclude: Collection[str] = frozenset(),
    ) -> None:
        if augment is not None and augment.pad >= min(image_size):
            raise UserError(f"augmentation: pad {augment.pad} is not smaller than the image, {image_size}")
        self.shards = list(shards)
        self.image_size = image_size
        self.tokenizer = tokenizer
        self.augment = augment
        self.images = [Images(each, image_size, cache) for each in self.shards]
        self._tokens: dict[int, npt.NDArray[np.int32]] | None = {} if cache is not None else None
        self._number(self._training_rows(frozenset(exclude)))
        if tokenizer is not None and not allow_uncaptioned:
            self._require_captions()

    def __len__(self) -> int:
        return len(self.row_N)

    def batch(self, task: BatchTask) -> Batch:
        """Make one micro-batch.

        Raises:
            UserError: an image does not decode, or a record is damaged.
        """
        height, width = self.image_size
        count = len(task.sample_id_B)
        length = self.tokenizer.context_length if self.tokenizer is not None else 1
        image_BCHW = np.empty((count, 3, height, width), dtype=np.uint8)
        token_BL = np.zeros((count, length), dtype=np.int64)
        pairs = zip(task.sample_id_B.tolist(), task.occurrence_B.tolist(), strict=True)
        for position, (sample_id, repeat) in enumerate(pairs):
            # Streams 0 and 1 of a sample are its augmentation and its caption, 2 and 3 those of a repetition.
            pixels = self.images[int(self.set_N[sample_id])](int(self.row_N[sample_id]))
            if self.augment is not None:
                pixels = self.augment(pixels, sample_rng(task.seed, task.epoch, sample_id, 2 * repeat))
            image_BCHW[position] = pixels.transpose(2, 0, 1)
            if self.tokenizer is not None:
                rows = self._token_rows(sample_id)
                if len(rows) > 1:
                    chosen = sample_rng(task.seed, task.epoch, sample_id, 2 * repeat + 1).integers(len(rows))
                    token_BL[position] = rows[chosen]
                elif len(rows):
                    token_BL[position] = rows[0]
        return {
            "image_BCHW": torch.from_numpy(image_BCHW),
            "token_BL": torch.from_numpy(token_BL),
            "pid_B": torch.from_numpy(self.pid_N[task.sample_id_B]),
            "camid_B": torch.from_numpy(self.camid_N[task.sample_id_B]),
            "sample_id_B": torch.from_numpy(task.sample_id_B),
        }

    def captions(self, sample_id: int) -> list[str]:
        """The captions of one sample."""
        record = self.shards[int(self.set_N[sample_id])].sample(int(self.row_N[sample_id]))
        return record.captions

    def _token_rows(self, sample_id: int) -> npt.NDArray[np.int32]:
        """Tokens of every caption of a sample, kept when there is a cache. Shape: (captions, L)."""
        assert self.tokenizer is not None
        if self._tokens is not None and sample_id in self._tokens:
            return self._tokens[sample_id]
        captions = self.captions(sample_id)
        length = self.tokenizer.context_length
        rows = self.tokenizer(captions).numpy().astype(np.int32) if captions else np.empty((0, length), np.int32)
        if self._tokens is not None:
            self._tokens[sample_id] = rows
        return rows

    def _training_rows(self, exclude: frozenset[str]) -> list[IntArray]:
        """The rows of each set that are trained on."""
        rows = [each.rows("train", ["train"]) for each in self.shards]
        names = ", ".join(str(each.path) for each in self.shards) or "no shard set"
        if not sum(map(len, rows)):
            raise UserError(f"data: {names}: no training samples (split train, role train)")
        kept = [_without(exclude, each, row) for each, row in zip(self.shards, rows, strict=True)]
        self.excluded = sum(map(len, rows)) - sum(map(len, kept))
        if not sum(map(len, kept)):
            raise UserError(
                f"data: {names}: all {self.excluded} training samples are of excluded identities; "
                f"shorten the list of exclusions or train on another set"
            )
        return kept

    def _number(self, rows: list[IntArray]) -> None:
        """Concatenate the training rows and number identities and cameras."""
        used = [
            [each.identities[pid] for pid in np.unique(each.index["pid"][row])]
            for each, row in zip(self.shards, rows, strict=True)
        ]
        self.identities = sorted({pid for pids in used for pid in pids})
        if sum(map(len, used)) != len(self.identities):
            names = ", ".join(str(each.path) for each in self.shards)
            raise UserError(
                f"data: {names}: two of the sets hold the same identities; leave one out or write it again "
                f"with `--dataset ANOTHER_NAME`"
            )
        number = {pid: position for position, pid in enumerate(self.identities)}
        pids, camids, camera_base = [], [], 0
        for each, row in zip(self.shards, rows, strict=True):
            lookup = np.array([number.get(pid, -1) for pid in each.identities], dtype=np.int64)
            pids.append(lookup[each.index["pid"][row]])
            camid = each.index["camid"][row].astype(np.int64)
            camids.append(np.where(camid < 0, -1, camid + camera_base))
            camera_base += int(camid.max(initial=-1)) + 1
        self.row_N: IntArray = np.concatenate(rows)
        self.set_N: IntArray = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        self.pid_N: IntArray = np.concatenate(pids)
        self.camid_N: IntArray = np.concatenate(camids)

    def _require_captions(self) -> None:
        for position, each in enumerate(self.shards):
            row = self.row_N[self.set_N == position]
            missing = row[each.index["captions"][row] == 0]
            if len(missing):
                raise UserError(
                    f"{each.path}: {len(missing)} of {len(row)} training samples have no caption, the "
                    f"first is {each.key(int(missing[0]))}; this stage needs captions: leave the set out"
                )


def _without(exclude: frozenset[str], shards: ShardSet, rows: IntArray) -> IntArray:
    """The rows that belong to none of some identities."""
    dropped = np.array([pid in exclude for pid in shards.identities], dtype=bool)
    kept: IntArray = rows[~dropped[shards.index["pid"][rows]]]
    return kept
