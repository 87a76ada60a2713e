"""A queue taken from a checkpoint: every number of ranks and every size reads back exactly what was there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import rank
from reid_dist.errors import UserError
from reid_dist.kernels.contrastive import EMPTY
from reid_dist.models.queue import FeatureQueue
from tests.gathered_pieces import Gathered, Whole, gather

D = 3


def make_rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, D, generator=generator)
    return image, text, torch.randint(50, (count,), generator=generator)


def filled(size: int, rows: int, sharded: bool = False, dtype: torch.dtype = torch.float32, **how: str) -> FeatureQueue:
    """The same rows whatever the number of ranks: rank 0 brings them all."""
    queue = FeatureQueue(size, D, 200, sharded=sharded, dtype=dtype, **how)  # type: ignore[arg-type]
    queue.commit([queue.gather(*make_rows(rows if rank() == 0 else 0, 1))])
    return queue


def alone(queue: FeatureQueue) -> Gathered:
    """What one rank alone saves."""
    pieces = list(queue.pieces())
    assert len({(piece.part, piece.name) for piece in pieces}) == len(pieces)
    return Gathered({"queue": {piece.name: piece.rows_N.clone() for piece in pieces}})


def _save(size: int, rows: int, sharded: bool, init: str) -> tuple[int, Whole]:
    queue = filled(size, rows, sharded, init=init)
    return int(queue.digest()), gather(queue.pieces())


def _restore(whole: Whole, size: int) -> list[int]:
    """Digests of a replicated and of a sharded queue."""
    digests = []
    for sharded in (False, True):
        queue = FeatureQueue(size, D, 5, sharded=sharded)
        queue.commit([queue.gather(*make_rows(3, 9))])  # what was there goes
        queue.restore(Gathered(whole))
        queue.check_agreement()
        digests.append(int(queue.digest()))
    return digests


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("init", "rows"), [("empty", 0), ("random_as_published", 9), ("empty", 100)])
def test_of_four_ranks_for_any(init: str, sharded: bool, rows: int, run_ranks: Callable) -> None:
    (digest, whole), *others = run_ranks(4, _save, 37, rows, sharded, init)
    assert {other for other, _ in others} == {digest}
    for ranks in (1, 2, 3):
        assert run_ranks(ranks, _restore, whole, 37) == [[digest] * 2] * ranks


def test_shards_without_a_slot(run_ranks: Callable) -> None:
    """Two slots on four ranks."""
    digest, whole = run_ranks(4, _save, 2, 9, True, "empty")[0]
    for ranks in (1, 3):
        assert run_ranks(ranks, _restore, whole, 2) == [[digest] * 2] * ranks


@pytest.mark.parametrize("init", ["empty", "random_as_published"])
@pytest.mark.parametrize("size", [1, 5, 11, 12, 40])
@pytest.mark.parametrize("rows", [0, 3, 11, 30])
def test_a_queue_of_another_size_gets_the_newest_rows(size: int, rows: int, init: str) -> None:
    """Into a smaller or equal one: as if it had been this size all along. Into a larger one: what there was."""
    queue = FeatureQueue(size, D, 5)
    queue.restore(alone(filled(11, rows, init=init)))
    images, _, ids = make_rows(rows, 1)
    kept = {int(n): row for row, n in enumerate(queue.ring.sequence_X[:size]) if queue.ring.ids_X[row] != EMPTY}
    start = FeatureQueue(11, D, 1, init="random_as_published")
    first = -11 if init == "random_as_published" else 0
    assert set(kept) == set(range(max(first, rows - min(size, 11)), rows))
    for number, row in kept.items():
        assert row == number % size
        if number >= 0:
            assert int(queue.ring.ids_X[row]) == int(ids[number])
            assert queue.ring.image_XD[row].equal(images[number])
        else:
            assert queue.ring.image_XD[row].equal(start.ring.image_XD[number % 11])
    assert bool(queue.ring.in_sequence()) and int(queue.ring.next) == rows


def test_a_restored_queue_goes_on_as_the_one_that_was_saved() -> None:
    queue, other = filled(11, 8), FeatureQueue(11, D, 200)
    other.restore(alone(queue))
    for q in (queue, other):
        q.commit([q.gather(*make_rows(9, 3))])
    assert int(queue.digest()) == int(other.digest())


def test_current_keys_are_counted_afterwards_too() -> None:
    """The storage is emptied, also where the last call's current keys were."""
    queue = filled(11, 8)
    saved = alone(queue)
    current = [queue.gather(*make_rows(3, 3))]
    anchors, ids, scale = torch.ones(2, D), torch.tensor([60, 61]), torch.zeros(())
    before = queue.lse(anchors, "image", ids, scale, current=current)
    queue.restore(saved)
    assert queue.lse(anchors, "image", ids, scale, current=current).equal(before)


def test_bf16_to_fp32_changes_no_value_and_fp32_to_bf16_rounds() -> None:
    exact, rounded = filled(6, 6), filled(6, 6, dtype=torch.bfloat16)
    down, up = FeatureQueue(6, D, 1, dtype=torch.bfloat16), FeatureQueue(6, D, 1)
    down.restore(alone(exact))
    up.restore(alone(rounded))
    assert int(down.digest()) == int(rounded.digest())
    assert up.ring.text_XD.equal(rounded.ring.text_XD.float())


def test_a_queue_that_was_not_saved_is_refused_and_stays() -> None:
    queue = filled(6, 4)
    before = int(queue.digest())
    with pytest.raises(UserError, match="queue ids"):
        queue.restore(Gathered({}))
    assert int(queue.digest()) == before
