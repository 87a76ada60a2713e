"""Streams of image-text pairs for sets too large to index: tars read from beginning to end.

The counterpart of `loader.TrainLoader`. Streams never end, so all ranks make the same steps whatever the tars hold.

Legend: B rows of one rank's micro-batch, G global batch, A micro-batches of a step.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from reid_dist.data.bad_samples import BadSamples
from reid_dist.data.batch_memory import BatchMemory
from reid_dist.data.sampler import local_batch_size
from reid_dist.data.stream.plan import StreamPlan
from reid_dist.data.stream.position import RankPosition, digest, start_position
from reid_dist.data.stream.reader import PairStream
from reid_dist.data.stream.samples import StreamSamples
from reid_dist.data.training_samples import Batch
from reid_dist.data.worker_processes import PREFETCH, from_workers
from reid_dist.errors import UserError

# When a reading process was killed.
_REMEDY = "use fewer workers or a smaller data.stream.shuffle_buffer"


@dataclass(frozen=True)
class StreamSampling:
    """How the steps of training are filled.

    Attributes:
        global_batch_size: G, samples of one optimizer step over all ranks and micro-batches.
        accumulation: A, micro-batches of one optimizer step.
        seed: of the order, the augmentations and the choice of captions.
        shuffle_buffer: samples that each stream holds and mixes, as files; 1 keeps the order of the tars.
        resampled: tars are drawn with replacement; otherwise each pass visits every tar once.
        weights: share of each source, each with passes of its own; they need not sum to 1. Empty: all sources
            together are one, so each has the share of its size.
    """

    global_batch_size: int
    accumulation: int = 1
    seed: int = 0
    shuffle_buffer: int = 1000
    resampled: bool = False
    weights: tuple[float, ...] = ()


class StreamLoader:
    """Training batches of one rank out of streams, one per worker.

    The order depends on the number of ranks and workers (0 counts as 1), augmentation and the choice of captions do
    not. A sample that cannot be read ends the run, unless `max_bad_fraction` allows some: the next one of the stream
    then takes its place.

    Attributes:
        samples: what is read.
        num_samples: training samples of all sources; None when a source was not counted.
        num_tars: number of tars.
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
        position: where to go on, see `position` and `stream.position.resume_position`; None begins.

    Raises:
        UserError: the global batch cannot be shared, there are fewer tars than streams, the weights do not fit the
            sources, or the position does not belong to this data and these settings.
    """

    def __init__(
        self,
        samples: StreamSamples,
        sampling: StreamSampling,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        max_bad_fraction: float = 0.0,
        position: dict[str, Any] | None = None,
    ) -> None:
        self.samples = samples
        self.sampling = sampling
        self.workers = workers
        self.pin_memory = pin_memory
        self.num_samples = samples.num_samples
        self.num_tars = len(samples.tars)
        self.local_batch_size = local_batch_size(sampling.global_batch_size, world_size, sampling.accumulation)
        self.wait_seconds = 0.0
        self._lanes = samples.lanes(bool(sampling.weights))
        self._weights = _shares(samples, sampling.weights)
        if sampling.shuffle_buffer < 1:
            raise UserError(f"data.stream.shuffle_buffer: {sampling.shuffle_buffer}; it holds at least 1 sample")
        self._plan = StreamPlan(
            tuple(map(len, self._lanes)),
            sampling.seed,
            world_size,
            max(1, workers),
            sampling.shuffle_buffer,
            sampling.resampled,
        )
        self._require_tars()
        parts = [source.identity() for source in samples.sources]
        self._position = start_position(self._plan, digest([*parts, list(sampling.weights)]), rank, position)
        self.bad_samples = BadSamples(max_bad_fraction)
        self.bad_samples.seen, self.bad_samples.count = self._position.seen, self._position.bad

    @property
    def num_identities(self) -> int:
        """Pairs have no identities that a head could have classes for."""
        return 0

    def passes(self, step: int) -> list[float]:
        """Passes that the steps before `step` make, of each source where they are weighted; empty when not counted."""
        taken = step * self.sampling.global_batch_size
        if not self.sampling.weights:
            return [] if self.num_samples is None else [taken / self.num_samples]
        counts = [source.samples for source in self.samples.sources]
        pairs = zip(self._weights, counts, strict=True)
        return [math.nan if count is None else taken * weight / count for weight, count in pairs]

    def position(self) -> dict[str, Any]:
        """Where this rank stands after the last step that `steps` gave: JSON-able, batches read in advance left out.

        Save that of every rank. `StreamLoader(..., position=...)` goes on from it with exactly the batches that would
        have followed; for another number of ranks or workers see `stream.position.resume_position`.
        """
        return self._position.model_dump()

    def describe(self, sample_id: int) -> str:
        """Names a sample, for messages."""
        return self.samples.describe(sample_id)

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each optimizer step in [start, stop): the A micro-batches of this rank.

        A stream goes on where it stands and cannot jump: `start` is the number of steps taken so far.

        Raises:
            UserError: another start, more bad samples than allowed, or a tar that cannot be read.
        """
        if start != self._position.step:
            raise UserError(
                f"the stream stands at step {self._position.step} and cannot start at {start}; "
                f"give it the position that was saved with the checkpoint"
            )
        accumulation = self.sampling.accumulation
        made = self._made((stop - start) * accumulation)
        for _ in range(start, stop):
            began = time.perf_counter()
            step = [next(made) for _ in range(accumulation)]
            self.wait_seconds += time.perf_counter() - began
            self._advance(step)
            yield [each.batch for each in step]

    def _advance(self, step: list["_Made"]) -> None:
        """Let the position take in a step that is handed out."""
        position = self._position
        for each in step:
            for lane, news in zip(position.streams[each.worker], json.loads(each.news), strict=True):
                lane.follow(news)
        position.turn = (position.turn + len(step)) % self._plan.workers
        position.step += 1
        position.seen, position.bad = self.bad_samples.seen, self.bad_samples.count

    def _made(self, count: int) -> Iterator["_Made"]:
        # Torch's own thread copies batches that are to be page-locked; it knows nothing of our places.
        shared = self.workers > 0 and not self.pin_memory
        # As many as torch asks for in advance, and what a consumer holds while it waits for the next step.
        places = PREFETCH * self.workers + 2 * self.sampling.accumulation + 1 if shared else 0
        memory = BatchMemory(places, self.local_batch_size, self.samples.image_size)
        worker = _Worker(self, memory)
        turn = self._position.turn
        tasks = (_Task((turn + number) % self._plan.workers, memory.take()) for number in range(count))
        made_by: Iterator[_Made | str] = map(worker.__getitem__, tasks)
        if self.workers:
            made_by = from_workers(worker, tasks, self.workers, self.pin_memory, _REMEDY)
        for made in made_by:
            if isinstance(made, str):
                raise UserError(made)
            batch = {name: torch.as_tensor(value) for name, value in made.batch.items()}
            if made.place >= 0:
                batch["image_BCHW"] = memory.tensor(made.place, self.local_batch_size).permute(0, 3, 1, 2)
            self.bad_samples.add(self.local_batch_size + len(made.bad), made.bad)
            yield made._replace(batch=batch)

    def _require_tars(self) -> None:
        """Every stream must have a tar of its own in each pass."""
        plan = self._plan
        for tars, lane in zip(plan.tars, self._lanes, strict=True):
            if plan.resampled or tars >= plan.streams:
                continue
            names = ", ".join(dict.fromkeys(tar.source.name for tar in lane))
            fewer = f"use at most {tars // plan.world_size} workers (data.workers), " if tars >= plan.world_size else ""
            raise UserError(
                f"{names}: {tars} tars, but {plan.world_size} ranks x {plan.workers} workers = {plan.streams} streams "
                f"need one each; write more, smaller tars (--shard-mb), {fewer}or set data.stream.resampled"
            )


class _Task(NamedTuple):
    """One micro-batch to make: by which worker, and the place of its images in the shared memory."""

    worker: int
    place: int


class _Made(NamedTuple):
    """A micro-batch; its images stay in the shared memory, if they have a place.

    `news` tells where its stream stands after it, as JSON: bytes pass through torch's queues and threads untouched.
    """

    batch: Any
    bad: list[str]
    place: int
    worker: int
    news: bytes


class _Worker(Dataset["_Made | str"]):
    """What makes the batches, in a worker process or in this one.

    Torch deals the tasks to its workers in turn, so one process always gets those of one stream. A UserError travels
    as text, as torch would bury it in a traceback.
    """

    def __init__(self, loader: StreamLoader, memory: BatchMemory) -> None:
        self._samples = loader.samples
        self._count = loader.local_batch_size
        self._seed = loader.sampling.seed
        self._setup = (loader._plan, loader._lanes, loader._weights)
        self._start: RankPosition = loader._position  # copied when the stream is opened, before the first step
        self._memory = memory
        self._bad = BadSamples(loader.bad_samples.max_fraction)
        self._stream: PairStream | None = None
        self._worker = -1

    def __getitem__(self, task: _Task) -> "_Made | str":
        out_BHWC = self._memory.array(task.place, self._count)
        try:
            stream = self._open(task.worker)
            batch, bad = self._samples.batch(stream.take, self._count, self._seed, self._bad, out_BHWC)
        except UserError as error:
            return str(error)
        news = json.dumps(stream.news()).encode()
        if out_BHWC is None:
            return _Made(batch, bad, -1, task.worker, news)
        del batch["image_BCHW"]
        # As arrays they go through the pipe; torch would open a file for each tensor, 0.3 ms apiece.
        return _Made({name: value.numpy() for name, value in batch.items()}, bad, task.place, task.worker, news)

    def _open(self, worker: int) -> PairStream:
        if self._stream is None:
            plan, lanes, weights = self._setup
            slot = plan.slot(self._start.rank, worker)
            positions = self._start.streams[worker]
            self._stream = PairStream(plan, lanes, weights, slot, positions, strict=not self._bad.max_fraction)
            self._worker = worker
        assert worker == self._worker, "torch no longer deals tasks in turn"
        return self._stream


def _shares(samples: StreamSamples, weights: tuple[float, ...]) -> list[float]:
    """Share of each lane.

    Raises:
        UserError: not one number above 0 for each source.
    """
    if not weights:
        return [1.0]
    if len(weights) != len(samples.sources) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(
            f"data.weights: {list(weights)} for {len(samples.sources)} sources; give one number above 0 for each"
        )
    return [weight / sum(weights) for weight in weights]
