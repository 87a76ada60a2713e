"""Memory of batches that workers fill and the parent gets back."""

import gc
import multiprocessing
import pickle

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from reid_dist.data.batch_memory import BatchMemory, image_buffer

SIZE = (3, 2)


def _fill(memory: BatchMemory, place: int, count: int, value: int) -> None:
    array = memory.array(place, count)
    assert array is not None
    array[...] = value


def test_a_forked_worker_writes_and_the_parent_reads() -> None:
    memory = BatchMemory(2, 5, SIZE)
    places = [memory.take(), memory.take()]
    assert sorted(places) == [0, 1] and memory.take() == -1
    for place, count in zip(places, (5, 4), strict=True):
        process = multiprocessing.get_context("fork").Process(target=_fill, args=(memory, place, count, place + 7))
        process.start()
        process.join()
    tensors = [memory.tensor(place, count) for place, count in zip(places, (5, 4), strict=True)]
    assert [tuple(tensor.shape) for tensor in tensors] == [(5, 3, 2, 3), (4, 3, 2, 3)]
    assert [tensor.unique().tolist() for tensor in tensors] == [[place + 7] for place in places]


def test_a_place_is_free_when_no_view_is_left() -> None:
    memory = BatchMemory(1, 2, SIZE)
    place = memory.take()
    _fill(memory, place, 2, 9)
    kept = memory.tensor(place, 2).permute(0, 3, 1, 2)[1:]
    gc.collect()
    assert memory.take() == -1 and kept.eq(9).all()
    half = kept.float()  # a copy holds nothing
    del kept
    assert memory.take() == place and half.eq(9).all()
    memory.release(place)
    memory.release(-1)
    assert memory.take() == place and memory.take() == -1


def test_spawned_workers_have_no_places() -> None:
    copy = pickle.loads(pickle.dumps(BatchMemory(2, 5, SIZE)))
    assert copy.take() == -1 and copy.array(0, 5) is None and copy.array(-1, 5) is None


class _Buffers(Dataset[torch.Tensor]):
    def __getitem__(self, number: int) -> torch.Tensor:
        buffer = image_buffer(4, SIZE)
        assert buffer.is_shared()
        buffer.numpy()[...] = number
        return buffer

    def __len__(self) -> int:
        return 3


def test_image_buffer_is_shared_in_workers() -> None:
    own = image_buffer(4, SIZE)
    assert own.shape == (4, 3, 2, 3) and own.dtype == torch.uint8 and not own.is_shared()
    batches = list(DataLoader(_Buffers(), batch_size=None, num_workers=1))
    assert [np.unique(batch.numpy()).tolist() for batch in batches] == [[0], [1], [2]]
