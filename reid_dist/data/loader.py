"""Batches of tensors: for training in an order that depends on (seed, epoch, step) alone, and for evaluation.

Legend: B rows of one rank's micro-batch, G global batch, A micro-batches of a step, N training samples.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from reid_dist.data.cache import ImageCache, Images, Size
from reid_dist.data.reader import ShardSet
from reid_dist.data.sampler import epoch_plan, identity_plan, local_batch_size, micro_batches, occurrences
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.data.training_samples import Batch, BatchTask, IntArray, TrainingSamples
from reid_dist.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the steps of training are filled.

    Attributes:
        kind: "epoch" takes each sample once per epoch; "identity" takes each identity once per epoch, with `images`
            images of it.
        global_batch_size: G, samples of one optimizer step over all ranks and micro-batches; for "identity" a
            multiple of `images`.
        images: images of one identity in a batch; only for "identity".
        accumulation: A, micro-batches of one optimizer step.
        seed: of the order, the augmentations and the choice of captions.
    """

    global_batch_size: int
    kind: Literal["epoch", "identity"] = "epoch"
    images: int = 4
    accumulation: int = 1
    seed: int = 0

    @property
    def group(self) -> int:
        """Rows that must stay together in one micro-batch."""
        return self.images if self.kind == "identity" else 1


class _Worker(Dataset[Batch | str]):
    """What a worker process runs; a UserError travels as text, as torch would bury it in a traceback."""

    def __init__(self, samples: TrainingSamples) -> None:
        self._samples = samples

    def __getitem__(self, task: BatchTask) -> Batch | str:
        try:
            return self._samples.batch(task)
        except UserError as error:
            return str(error)


class TrainLoader:
    """Training batches of one rank.

    The order, the augmentations and the choice of captions are pure functions of (seed, epoch, step) and of the place
    in the global batch: another world size, accumulation or number of workers, or a resumed run, sees the same.

    Attributes:
        samples: the numbered training samples.
        num_samples: N.
        identities: pid strings; `pid_B` points into them.
        num_identities: their number.
        steps_per_epoch: optimizer steps of one pass.
        local_batch_size: B.
        wait_seconds: time spent waiting for batches, summed up since the loader was made.

    Args:
        samples: what to read.
        sampling: how to fill the steps.
        rank: of this process.
        world_size: number of ranks.
        workers: reading processes; 0 reads in this one.
        pin_memory: page-locked batches for faster copies to a GPU; only with workers.

    Raises:
        UserError: the global batch cannot be shared, or there are too few identities for it.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        sampling: Sampling,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.samples = samples
        self.sampling = sampling
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.pin_memory = pin_memory
        self.identities = samples.identities
        self.num_identities = len(samples.identities)
        self.num_samples = len(samples)
        self.local_batch_size = local_batch_size(
            sampling.global_batch_size, world_size, sampling.accumulation, sampling.group
        )
        self.wait_seconds = 0.0
        self._plan = self._make_plan(0)
        self._plan_epoch = 0
        self.steps_per_epoch = len(self._plan)

    def epoch(self, step: int) -> int:
        """The epoch that a global step belongs to."""
        return step // self.steps_per_epoch

    def step_rows(self, step: int) -> IntArray:
        """Sample numbers of the whole global batch of a step. Shape: (G,)."""
        epoch = self.epoch(step)
        if epoch != self._plan_epoch:
            self._plan, self._plan_epoch = self._make_plan(epoch), epoch
        row_G: IntArray = self._plan[step % self.steps_per_epoch]
        return row_G

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each optimizer step in [start, stop): the A micro-batches of this rank.

        Raises:
            UserError: an image does not decode.
        """
        batches = self._batches(start, stop)
        for _ in range(start, stop):
            began = time.perf_counter()
            step = [next(batches) for _ in range(self.sampling.accumulation)]
            self.wait_seconds += time.perf_counter() - began
            yield step

    def _make_plan(self, epoch: int) -> IntArray:
        sampling = self.sampling
        if sampling.kind == "identity":
            identities = sampling.global_batch_size // sampling.images
            return identity_plan(self.samples.pid_N, identities, sampling.images, sampling.seed, epoch)
        return epoch_plan(self.num_samples, sampling.global_batch_size, sampling.seed, epoch)

    def _tasks(self, start: int, stop: int) -> Iterator[BatchTask]:
        sampling = self.sampling
        for step in range(start, stop):
            row_G = self.step_rows(step)
            repeat_G = occurrences(row_G)
            places = micro_batches(
                np.arange(len(row_G)), self.rank, self.world_size, sampling.accumulation, sampling.group
            )
            for place_B in places:
                yield BatchTask(sampling.seed, self.epoch(step), row_G[place_B], repeat_G[place_B])

    def _batches(self, start: int, stop: int) -> Iterator[Batch]:
        if self.workers == 0:
            for task in self._tasks(start, stop):
                yield self.samples.batch(task)
            return
        for batch in self._data_loader(start, stop):
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def _data_loader(self, start: int, stop: int) -> "DataLoader[Batch | str]":
        return DataLoader(
            _Worker(self.samples),
            batch_size=None,  # a worker makes whole micro-batches
            sampler=self._tasks(start, stop),
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=self.pin_memory,
            # Its own generator: torch would otherwise draw the workers' seed from the global one, and the
            # model's random numbers would depend on the number of loaders started.
            generator=torch.Generator(),
        )


def _unchanged(batch: Any) -> Any:
    return batch


def eval_batches(
    shards: ShardSet,
    rows: IntArray,
    size: Size,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    cache: ImageCache | None = None,
) -> Iterator[tuple[IntArray, Batch]]:
    """Images of some rows, each once over all ranks, without a collective.

    Blocks of `batch_size` rows go to the ranks in turn, so ranks may get different numbers of batches and the last
    block may be short.

    Args:
        shards: one set.
        rows: rows of the set. Shape: (N,).
        size: (height, width).
        batch_size: rows of a block.
        rank: of this process.
        world_size: number of ranks.
        cache: see `ImageCache`.

    Yields:
        Positions in `rows`, shape (B,), and the batch: `pid_B` points into `shards.identities`, `sample_id_B` holds
        the rows, `token_BL` is zeros with L = 1 (for sentences see `caption_batches`).

    Raises:
        UserError: an image does not decode.
    """
    images = Images(shards, size, cache)
    for position_B in _blocks(len(rows), batch_size, rank, world_size):
        row_B = np.asarray(rows, dtype=np.int64)[position_B]
        image_BHWC = np.stack([images(row) for row in row_B.tolist()])
        yield (
            position_B,
            {
                "image_BCHW": torch.from_numpy(np.ascontiguousarray(image_BHWC.transpose(0, 3, 1, 2))),
                "token_BL": torch.zeros(len(row_B), 1, dtype=torch.int64),
                "pid_B": torch.from_numpy(shards.index["pid"][row_B].astype(np.int64)),
                "camid_B": torch.from_numpy(shards.index["camid"][row_B].astype(np.int64)),
                "sample_id_B": torch.from_numpy(row_B),
            },
        )


def caption_table(shards: ShardSet, rows: IntArray) -> tuple[list[str], IntArray]:
    """Every caption of some rows.

    Args:
        shards: one set.
        rows: rows of the set. Shape: (N,).

    Returns:
        The M captions and, for each, the position in `rows` of its image. Shape: (M,).
    """
    per_row = [shards.sample(row).captions for row in np.asarray(rows).tolist()]
    positions = np.repeat(np.arange(len(per_row)), [len(captions) for captions in per_row])
    return [caption for captions in per_row for caption in captions], positions.astype(np.int64)


def caption_batches(
    captions: Sequence[str], tokenizer: Tokenizer, batch_size: int = 256, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[IntArray, torch.Tensor]]:
    """Tokens of captions, each once over all ranks, without a collective.

    Yields:
        Positions in `captions`, shape (B,), and `token_BL`.
    """
    for position_B in _blocks(len(captions), batch_size, rank, world_size):
        yield position_B, tokenizer([captions[position] for position in position_B.tolist()])


def _blocks(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[IntArray]:
    for first in range(rank * batch_size, count, world_size * batch_size):
        yield np.arange(first, min(first + batch_size, count), dtype=np.int64)
