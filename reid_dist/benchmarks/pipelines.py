"""Four ways from JPEG crops to batches of pixels, each as a source that can be timed again and again.

All resize with Pillow's bicubic filter to the same size, none augments, and each uses the given number of processes.
"""

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from reid_dist.data.batch_memory import BatchMemory
from reid_dist.data.loader import Sampling, TrainLoader
from reid_dist.data.reader import ShardSet
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.data.transforms import decode_into

Size = tuple[int, int]

# What torch's loaders make in advance for each worker; the same for all.
_PREFETCH = 2


class Pipeline(Protocol):
    """A way to read images."""

    def measure(self, seconds: float) -> float:
        """Images per second over at least this time, at steady state; it rests before and after."""

    def close(self) -> None:
        """End its processes."""


class _Batches:
    """Times an endless iterator over batches; `count` tells how many images one holds."""

    def __init__(self, batches: Iterator[Any], count: Callable[[Any], int], workers: int) -> None:
        self._batches = batches
        self._count = count
        # While it rested, the workers filled their queue: those batches cost nothing and are not counted.
        self._ahead = (_PREFETCH + 1) * workers + 1

    def measure(self, seconds: float) -> float:
        for _ in range(self._ahead):
            next(self._batches)
        images, batches, began = 0, 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            images += self._count(next(self._batches))
            batches += 1
        # Its workers go on until the queue is full again; the next pipeline shall have the machine to itself.
        time.sleep(self._ahead * taken / batches)
        return images / taken

    def close(self) -> None:
        del self._batches


def ours(folder: Path, size: Size, batch_size: int, workers: int) -> Pipeline:
    """The loader that training uses, in its order by epochs."""
    samples = TrainingSamples([ShardSet(folder)], size)
    loader = TrainLoader(samples, Sampling(batch_size), workers=workers)
    return _Batches(loader.steps(0, 10**9), lambda step: sum(len(batch["image_BCHW"]) for batch in step), workers)


def plain_webdataset(folder: Path, size: Size, batch_size: int, workers: int) -> Pipeline:
    """The webdataset library as its documentation shows it: decode with PIL, resize, batch in the worker, WebLoader."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(_Resize(size))
        .batched(batch_size)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=_PREFETCH)
    return _Batches(iter(loader), lambda batch: len(batch[0]), workers)


def image_folder(folder: Path, size: Size, batch_size: int, workers: int) -> Pipeline:
    """A Dataset over image files with PIL, as most re-ID code bases have it, and torch's own collation."""
    dataset = _ImageFiles(sorted(folder.glob("*.jpg")), size)

    def epochs() -> Iterator[torch.Tensor]:
        # `persistent_workers`: an epoch does not start its processes anew.
        loader = DataLoader(
            dataset,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            persistent_workers=True,
        )
        return itertools.chain.from_iterable(itertools.repeat(loader))

    return _Batches(epochs(), len, workers)


class _Resize:
    def __init__(self, size: Size) -> None:
        self._size = (size[1], size[0])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class _ImageFiles(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path], size: Size) -> None:
        self._paths = paths
        self._resize = _Resize(size)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self._paths[number]) as image:
            return self._resize(image.convert("RGB"))


class Bare:
    """Decoding and resizing alone, by our decoder, from bytes in memory into one batch buffer in each process.

    The buffer is shared memory: no other can be handed to the process that trains without copying it. (The decoder is
    up to 10 % faster into private memory, where the system backs only that with huge pages.)
    """

    def __init__(self, images: list[bytes], size: Size, batch_size: int, workers: int) -> None:
        context = multiprocessing.get_context("fork")  # shares the bytes
        self._pipes: list[Connection] = []
        self._processes = []
        for worker in range(workers):
            here, there = context.Pipe()
            part = images[worker::workers] or images
            process = context.Process(target=_decode_on_request, args=(there, part, size, batch_size), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def measure(self, seconds: float) -> float:
        """See `Pipeline`: the sum over the processes, each timed by itself."""
        for pipe in self._pipes:
            pipe.send(seconds)
        return sum(float(pipe.recv()) for pipe in self._pipes)

    def close(self) -> None:
        """See `Pipeline`."""
        for pipe in self._pipes:
            # A message: closing ends nothing while processes that were forked later hold copies of this end.
            with contextlib.suppress(OSError):
                pipe.send(0)
        for process in self._processes:
            process.join()


def _decode_on_request(pipe: Connection, images: list[bytes], size: Size, batch_size: int) -> None:
    """Answer each number of seconds with images per second over that time; 0 ends."""
    batch_BHWC = BatchMemory(1, batch_size, size).array(0, batch_size)
    endless = itertools.cycle(images)
    _fill(batch_BHWC, endless)
    while seconds := pipe.recv():
        _fill(batch_BHWC, endless)
        count, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            _fill(batch_BHWC, endless)
            count += batch_size
        pipe.send(count / taken)


def _fill(batch_BHWC: Any, images: Iterator[bytes]) -> None:
    for out_HWC in batch_BHWC:
        decode_into(next(images), out_HWC, "image")
