"""Batches of tensors: for training in an order that depends on (seed, epoch, step) alone, and for evaluation.

Legend: B rows of one rank's micro-batch, G global batch, A micro-batches of a step, N training samples, S shard sets.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from reid_dist.data.bad_samples import BadSamples
from reid_dist.data.batch_memory import BatchMemory
from reid_dist.data.cache import ImageCache, Images, Size
from reid_dist.data.captioned_rows import require_equal_rows
from reid_dist.data.mixing import Mixing
from reid_dist.data.reader import ShardSet
from reid_dist.data.sampler import Plan, local_batch_size, micro_batches, occurrences
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.data.training_samples import Batch, BatchTask, TrainingSamples
from reid_dist.data.units import Identities, IntArray, Samples, Units
from reid_dist.data.worker_processes import PREFETCH, from_workers
from reid_dist.errors import UserError

# When a reading process was killed.
_REMEDY = "use fewer workers or a smaller batch, and start again"


@dataclass(frozen=True)
class Sampling:
    """How the steps of training are filled.

    Attributes:
        kind: "epoch" takes each sample once per epoch; "identity" takes each identity once per epoch, with `images`
            images of it, of different cameras where it has such.
        global_batch_size: G, samples of one optimizer step over all ranks and micro-batches; for "identity" a
            multiple of `images`.
        images: images of one identity in a batch; only for "identity".
        accumulation: A, micro-batches of one optimizer step.
        seed: of the order, the augmentations and the choice of captions.
        weights: share of each shard set in every step, each with epochs of its own; they need not sum to 1. Empty:
            all sets together are gone through once per epoch, so each has the share of its size.
        mixing: how several sets share the steps, see `mixing.build_schedule`. Anything but "mixed" gives each set
            epochs of its own, and without weights the share of its size.
        steps: optimizer steps of the whole run; only "sequential" needs them.
    """

    global_batch_size: int
    kind: Literal["epoch", "identity"] = "epoch"
    images: int = 4
    accumulation: int = 1
    seed: int = 0
    weights: tuple[float, ...] = ()
    mixing: Mixing = "mixed"
    steps: int = 0

    @property
    def group(self) -> int:
        """Rows that must stay together in one micro-batch."""
        return self.images if self.kind == "identity" else 1


class _Made(NamedTuple):
    """A micro-batch on its way out of a worker.

    Where the images have a place in the shared memory they stay there, and the rest goes through the pipe as arrays:
    tensors would each be sent as a file descriptor, which costs the receiver as much as a few images.
    """

    batch: dict[str, torch.Tensor | IntArray]
    bad: list[str]
    place: int


class _Worker(Dataset["_Made | str"]):
    """What makes the batches, in a worker process or in this one.

    A UserError travels as text, as torch would bury it in a traceback.
    """

    def __init__(self, samples: TrainingSamples, replace: bool, memory: BatchMemory) -> None:
        self._samples = samples
        self._replace = replace
        self._memory = memory

    def __getitem__(self, task: BatchTask) -> "_Made | str":
        bad: list[str] = []
        out_BHWC = self._memory.array(task.place, len(task.sample_id_B))
        try:
            batch = self._samples.batch(task, out_BHWC, bad if self._replace else None)
        except UserError as error:
            return str(error)
        if out_BHWC is None:
            return _Made({**batch}, bad, -1)
        del batch["image_BCHW"]
        return _Made({name: value.numpy() for name, value in batch.items()}, bad, task.place)


class TrainLoader:
    """Training batches of one rank.

    The order, the augmentations and the choice of captions are pure functions of (seed, epoch, step) and of the place
    in the global batch: another world size, accumulation or number of workers, or a resumed run, sees the same.

    A sample that cannot be read ends the run, unless `max_bad_fraction` allows some: then another one takes its place
    (the next of the epoch's order; another image of the same identity where identities are drawn), the same one
    whatever the world size, and all ranks still make the same steps.

    Attributes:
        samples: the numbered training samples.
        num_samples: N.
        identities: pid strings; `pid_B` points into them.
        num_identities: their number.
        local_batch_size: B.
        wait_seconds: time spent waiting for batches, summed up since the loader was made.
        bad_samples: count and names of the samples of this rank that could not be read.

    Args:
        samples: what to read.
        sampling: how to fill the steps.
        rank: of this process.
        world_size: number of ranks.
        workers: reading processes; 0 reads in this one.
        pin_memory: page-locked batches for faster copies to a GPU; only with workers.
        max_bad_fraction: share of the samples of this rank that may be bad, see `BadSamples`.
        positions: of all ranks of a run that this one goes on with, by any number of ranks; see `position`.

    Raises:
        UserError: the global batch cannot be shared, the weights do not fit the sets, there are too few identities
            for a batch, or captions in other numbers on other ranks.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        sampling: Sampling,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        max_bad_fraction: float = 0.0,
        positions: Sequence[dict[str, Any]] = (),
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
        self.bad_samples = BadSamples(max_bad_fraction)
        if positions:
            # With other ranks the counts stay whole: one of the new ranks has those of several, or of none.
            for position in positions[rank::world_size]:
                self.bad_samples.take_over(position["bad_samples"])
        if samples.partly_captioned and sampling.mixing == "mixed":
            captioned = samples.captioned_S.tolist()
            require_equal_rows(
                captioned,
                sampling.weights,
                sampling.global_batch_size,
                world_size,
                sampling.accumulation,
                sampling.group,
            )
        units = _units(samples, sampling)
        self._plan = Plan(
            units,
            sampling.global_batch_size,
            sampling.seed,
            sampling.weights or [len(each) for each in units],
            max_bad_fraction > 0,
            sampling.mixing,
            sampling.steps,
            # Captioned or not, whether captions are read or not: with and without text supervision the order is one.
            samples.captioned_S.tolist() if sampling.weights else (),
        )

    def position(self) -> dict[str, Any]:
        """What a step's number does not say, for a checkpoint: JSON-able."""
        return {"bad_samples": self.bad_samples.state()}

    def describe(self, sample_id: int) -> str:
        """Names a sample, for messages."""
        return self.samples.describe(sample_id)

    def passes(self, step: int) -> list[float]:
        """Epochs that the steps before `step` make: of each set where they have epochs of their own."""
        return self._plan.passes(step)

    def step_rows(self, step: int) -> IntArray:
        """Sample numbers of the whole global batch of a step. Shape: (G,)."""
        return self._plan.step(step).sample_G

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each optimizer step in [start, stop): the A micro-batches of this rank.

        Raises:
            UserError: more samples are bad than allowed, or a worker process was killed.
        """
        batches = self._batches(start, stop)
        for _ in range(start, stop):
            began = time.perf_counter()
            step = [next(batches) for _ in range(self.sampling.accumulation)]
            self.wait_seconds += time.perf_counter() - began
            yield step

    def _tasks(self, start: int, stop: int, memory: BatchMemory) -> Iterator[BatchTask]:
        sampling = self.sampling
        places = micro_batches(
            np.arange(sampling.global_batch_size), self.rank, self.world_size, sampling.accumulation, sampling.group
        )
        for step in range(start, stop):
            rows = self._plan.step(step)
            repeat_G = occurrences(rows.sample_G)
            for place_B in places:
                yield BatchTask(
                    sampling.seed,
                    rows.epoch_G[place_B],
                    rows.sample_G[place_B],
                    repeat_G[place_B],
                    rows.spare_GR[place_B],
                    memory.take(),
                )

    def _batches(self, start: int, stop: int) -> Iterator[Batch]:
        # Torch's own thread copies batches that are to be page-locked; it knows nothing of our places.
        shared = self.workers > 0 and not self.pin_memory
        # As many as torch asks for in advance, and what a consumer holds while it waits for the next step.
        places = PREFETCH * self.workers + 2 * self.sampling.accumulation + 1 if shared else 0
        memory = BatchMemory(places, self.local_batch_size, self.samples.image_size)
        worker = _Worker(self.samples, self.bad_samples.max_fraction > 0, memory)
        tasks = self._tasks(start, stop, memory)
        made_by: Iterator[_Made | str] = map(worker.__getitem__, tasks)
        if self.workers:
            made_by = from_workers(worker, tasks, self.workers, self.pin_memory, _REMEDY)
        for made in made_by:
            if isinstance(made, str):
                raise UserError(made)
            batch = {name: torch.as_tensor(value) for name, value in made.batch.items()}
            if made.place >= 0:
                batch["image_BCHW"] = memory.tensor(made.place, self.local_batch_size).permute(0, 3, 1, 2)
            self.bad_samples.add(self.local_batch_size, made.bad)
            yield batch


def _units(samples: TrainingSamples, sampling: Sampling) -> list[Units]:
    """What the plan orders: all sets as one, or each by itself where they have weights or turns."""
    apart = bool(sampling.weights) or sampling.mixing != "mixed"
    counts = samples.counts if apart else [len(samples)]
    if sampling.weights and (
        len(sampling.weights) != len(counts) or not all(w > 0 and math.isfinite(w) for w in sampling.weights)
    ):
        raise UserError(
            f"data.weights: {list(sampling.weights)} for {len(counts)} shard sets; give one number above 0 for each"
        )
    for shards, count in zip(samples.shards, counts, strict=False):
        if apart and not count:
            key = "weights" if sampling.weights else "mixing"
            raise UserError(f"data.{key}: {shards.shown} has no training samples; leave the set out")
    units: list[Units] = []
    for stop, count in zip(itertools.accumulate(counts), counts, strict=True):
        rows = slice(stop - count, stop)
        if sampling.kind == "identity":
            units.append(Identities(samples.pid_N[rows], samples.camid_N[rows], sampling.images, rows.start))
        else:
            units.append(Samples(count, rows.start))
    return units


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
