"""A queue on several ranks: the same bytes whatever the ranks and micro-steps, and a digest that tells when not."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import rank, world_size
from reid_dist.errors import DivergenceError
from reid_dist.kernels.contrastive import EMPTY
from reid_dist.models.queue import FeatureQueue
from tests.models.queue_cases import D, make_rows, push, raw_sha

# Ranks and accumulation


def _commit_steps(micro_steps: int, steps: list[list[int]], size: int) -> tuple[str, int]:
    """Ragged steps: `steps[s][m]` rows in the m-th micro-batch of one rank at world size 1."""
    queue = FeatureQueue(size, D, 6, dtype=torch.bfloat16)
    for number, counts in enumerate(steps):
        parts = [make_rows(count, 100 * number + m) for m, count in enumerate(counts)]
        own = parts[rank() :: world_size()]
        assert len(own) == micro_steps
        queue.commit([queue.gather(*part) for part in own])
    return raw_sha(queue), int(queue.digest())


@pytest.mark.parametrize("micro_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_and_accumulation_leave_the_same_bytes(ranks: int, micro_steps: int, run_ranks: Callable) -> None:
    """N ranks with A micro-steps against one rank with N x A, ragged, at a prime size that the batches wrap often."""
    script = random.Random(ranks * 10 + micro_steps)
    steps = [[script.randrange(7) for _ in range(ranks * micro_steps)] for _ in range(5)]
    expected = _commit_steps(ranks * micro_steps, steps, 13)
    assert set(run_ranks(ranks, _commit_steps, micro_steps, steps, 13)) == {expected}


def _gathers_in_flight() -> list[list[int]]:
    """Several gathers on their way at once, other collectives between them, waited for in another order."""
    queue = FeatureQueue(8, D, 2)
    first = queue.gather(*make_rows(2, rank()))
    second = queue.gather(*make_rows(rank(), 10 + rank()))
    queue.check_agreement()
    found = [second.wait()[2].tolist(), first.wait()[2].tolist()]
    queue.gather(*make_rows(1, 0))  # dropped without waiting: a skipped step
    return found


def test_gathers_may_overlap_and_may_be_dropped(run_ranks: Callable) -> None:
    first = torch.cat([make_rows(2, r)[2] for r in range(2)]).tolist()
    second = [EMPTY, EMPTY, *make_rows(1, 11)[2].tolist(), EMPTY]
    assert run_ranks(2, _gathers_in_flight) == [[second, first]] * 2


def _random_start(size: int, sharded: bool) -> tuple[int, Tensor]:
    queue = FeatureQueue(size, D, 2, init="random_as_published", sharded=sharded, seed=5)
    return int(queue.digest()), queue.ring.image_XD


@pytest.mark.parametrize("size", [1, 9, 5000])
def test_random_start_is_the_same_on_all_ranks_and_world_sizes(size: int, run_ranks: Callable) -> None:
    expected, keys = _random_start(size, sharded=False)
    assert [(d, k.equal(keys)) for d, k in run_ranks(2, _random_start, size, False)] == [(expected, True)] * 2
    assert [d for d, _ in run_ranks(3, _random_start, size, True)] == [expected] * 3


# Digest and agreement


def _changes(queue: FeatureQueue) -> Iterator[str]:
    """Changes the queue in place, says how, and the caller looks at the digest; the change stays."""
    ring = queue.ring
    ring.image_XD[2, 1] = -ring.image_XD[2, 1]
    yield "one sign"
    ring.text_XD[[0, 1]] = ring.text_XD[[1, 0]]
    yield "two text keys swapped"
    swapped = ring.image_XD[3].clone()
    ring.image_XD[3], ring.text_XD[3] = ring.text_XD[3].clone(), swapped
    yield "a row's modalities swapped"
    ring.ids_X[4] += 1
    yield "one id"
    ring.sequence_X[0] += queue.size
    yield "one sequence number"
    ring.next += 1
    yield "the next number"
    for part in (ring.image_XD, ring.text_XD, ring.ids_X, ring.sequence_X):
        part[:5] = part[:5].roll(1, 0)
    yield "all slots moved by one"


@pytest.mark.parametrize("features", [5, 8])  # rows that can and cannot be cut into words of 8 bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_digest_changes_with_every_bit_and_place(dtype: torch.dtype, features: int) -> None:
    queue = FeatureQueue(5, features, 5, dtype=dtype)
    push(queue, make_rows(5, 1, features=features))
    seen = [int(queue.digest())]
    for how in _changes(queue):
        assert int(queue.digest()) not in seen, how
        seen.append(int(queue.digest()))


def test_digest_leaves_out_what_is_no_content() -> None:
    queue, other = FeatureQueue(5, D, 5), FeatureQueue(5, D, 7)
    for q in (queue, other):
        push(q, make_rows(5, 1))
    assert int(queue.digest()) == int(other.digest())
    other.lse(torch.ones(1, D), "image", torch.tensor([1]), torch.zeros(()), current=[other.gather(*make_rows(7, 2))])
    assert int(queue.digest()) == int(other.digest())


def _diverge(culprits: list[int], sharded: bool, how: str) -> str | None:
    queue = FeatureQueue(6, D, 3, sharded=sharded)
    push(queue, make_rows(3, rank()))
    queue.check_agreement()
    if rank() in culprits and how == "key":
        queue.ring.image_XD[0, 0] += 1 + rank()
    elif rank() in culprits and how == "commit":
        image, text, ids = make_rows(1, 9)
        queue.ring.push(image, text, ids.int())
    elif rank() in culprits:
        queue.ring.sequence_X[0] += 6
    try:
        queue.check_agreement()
    except DivergenceError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("ranks", "culprits", "expected"),
    [
        (3, [1], "rank 1 of 3 diverged from the others"),
        (3, [0], "rank 0 of 3 diverged"),
        (2, [1], "two ranks differ"),
        (5, [2, 4], "ranks 2, 4 of 5 diverged"),
    ],
)
def test_the_rank_that_diverged_is_named_on_every_rank(
    ranks: int, culprits: list[int], expected: str, run_ranks: Callable
) -> None:
    found = run_ranks(ranks, _diverge, culprits, False, "key")
    assert len(set(found)) == 1 and found[0].startswith("the feature queue is not the same on all ranks: ")
    assert expected in found[0]
    assert found[0].endswith("continue from the last checkpoint")


@pytest.mark.parametrize("how", ["commit", "sequence"])
def test_a_shard_out_of_step_is_named(how: str, run_ranks: Callable) -> None:
    for found in run_ranks(3, _diverge, [2], True, how):
        assert "rank 2 of 3 diverged" in str(found)


def test_agreeing_ranks_are_left_alone(run_ranks: Callable) -> None:
    for sharded in (False, True):
        assert run_ranks(3, _diverge, [], sharded, "key") == [None] * 3
