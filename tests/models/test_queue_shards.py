"""The sharded queue beside the replicated one: loss and gradients equal, on any number of ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.distributed import all_gather_object, rank
from reid_dist.models.queue import FeatureQueue, PendingKeys
from reid_dist.models.queue_shards import sharded_means

MAX_ROWS = 6
MODES: list[dict[str, Any]] = [
    {"mask": "identity"},
    {"mask": "none"},
    {"mask": "positives"},
    {"mask": "none", "batch_ids_U": True},
]


def make_rows(count: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, features, generator=generator, dtype=torch.float64)
    # Unit vectors, so that the logits' own rounding stays below the bounds.
    return F.normalize(image), F.normalize(text), torch.randint(6, (count,), generator=generator)


def _filled(size: int, features: int, dtype: torch.dtype, sharded: bool, init: Any) -> tuple[FeatureQueue, list]:
    """A queue after three ragged commits, and two gathers that are still to be committed."""
    queue = FeatureQueue(size, features, MAX_ROWS, sharded=sharded, dtype=dtype, init=init)
    pending: list[PendingKeys] = []
    for step in range(5):
        if step == 3:
            queue.commit(pending)
            pending = []
        pending.append(queue.gather(*make_rows((5 * rank() + 2 * step + 1) % 7, features, 10 * step + rank())))
    return queue, pending


def _losses(sharded: bool, size: int, features: int, dtype: torch.dtype, scale: float, init: str) -> list[list[Tensor]]:
    """For each way to count, on this rank: lse, gradients of anchors and of log_scale, means, counts, and the sum of
    the absolute terms whose sum is the gradient of log_scale."""
    queue, pending = _filled(size, features, dtype, sharded, init)
    image, _, ids = make_rows((3 + 2 * rank()) % (MAX_ROWS + 1), features, 99 + rank())
    results = []
    for mode in MODES:
        for modality, current in (("image", []), ("text", pending), ("image", pending[1:])):
            how = {**mode, "batch_ids_U": pending[0].wait()[2]} if "batch_ids_U" in mode else mode
            anchors = image.to(dtype).requires_grad_()
            log_scale = torch.full((1,), scale, dtype=image.dtype if dtype == image.dtype else torch.float32)
            log_scale.requires_grad_()
            lse = queue.lse(anchors, modality, ids, log_scale, current=current, **how)
            weight = torch.linspace(0.3, 2, len(ids)).to(lse.dtype) * lse.detach().isfinite()
            (lse.masked_fill(lse.detach().isinf(), 0) * weight).sum().backward()
            assert anchors.grad is not None and anchors.grad.dtype == dtype
            assert log_scale.grad is not None and log_scale.grad.shape == (1,)
            means = queue.positive_means(modality, ids, current)
            terms = (anchors.grad * anchors.detach()).abs().sum()
            found = [lse.detach(), anchors.grad, log_scale.grad, *means, terms]
            results.append([x.clone() for x in found])
    return results


def _both(*case: Any) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    return _losses(False, *case), _losses(True, *case)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    finite = expected.isfinite()
    assert found.isfinite().equal(finite) and found[~finite].equal(expected[~finite])
    error = (found[finite].double() - expected[finite].double()).norm()
    return float(error / expected[finite].double().norm().clamp(min=1e-30))


def _over_ranks(results: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Each result of the global batch, for each way to count."""
    by_way = (zip(*ways, strict=True) for ways in zip(*results, strict=True))
    return [[torch.cat([x.reshape(-1) for x in ranks]) for ranks in parts] for parts in by_way]


SIZES = [(23, 7, 0.0), (2, 5, 1.0), (1, 1, 0.5), (64, 16, 2.7)]  # slots, features, log_scale


def _both_of_every_size() -> list[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    return [
        _both(size, features, dtype, scale, "random_as_published" if size == 64 else "empty")
        for dtype in (torch.float32, torch.float64)
        for size, features, scale in SIZES
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_loss_and_gradients_equal_the_replicated_queue(ranks: int, run_ranks: Callable) -> None:
    """Ragged anchors, shards without a slot (2 slots, 4 ranks), every mask, current keys."""
    found_by_rank = run_ranks(ranks, _both_of_every_size)
    for number, case in enumerate(zip(*found_by_rank, strict=True)):
        bound = 1e-6 if number < len(SIZES) else 1e-13
        replicated, sharded = (_over_ranks([both[i] for both in case]) for i in range(2))
        for expected, found in zip(replicated, sharded, strict=True):
            lse, anchors, scale, *means, _ = (relative(x, y) for x, y in zip(found, expected, strict=True))
            assert max(lse, anchors, *means) <= bound, number
            # Its terms cancel; the error is that of the terms.
            assert scale * float(expected[2].norm()) <= bound * float(expected[-1].norm()), number


def _bf16() -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    return _both(50, 16, torch.bfloat16, 1.0, "empty")


def test_bf16_keys_differ_by_the_rounding_of_the_gradient_alone(run_ranks: Callable) -> None:
    for replicated, sharded in run_ranks(3, _bf16):
        for expected, found in zip(replicated, sharded, strict=True):
            assert relative(found[0], expected[0]) <= 1e-6
            assert relative(found[1], expected[1]) <= 2e-3


def _content(size: int) -> tuple[int, list[tuple[int, ...]]]:
    queue, pending = _filled(size, 3, torch.float32, True, "empty")
    queue.commit(pending)
    ring = queue.ring
    own = [(slot, int(ring.ids_X[row]), int(ring.sequence_X[row])) for row, slot in enumerate(_slots(ring))]
    return int(queue.digest()), sorted(row for part in all_gather_object(own) for row in part)


def _slots(ring: Any) -> list[int]:
    return list(range(ring.shard, ring.size, ring.shards))


def _replicated_content(size: int) -> tuple[int, list[tuple[int, ...]]]:
    queue, pending = _filled(size, 3, torch.float32, False, "empty")
    queue.commit(pending)
    ids, sequence = queue.ring.ids_X[:size].tolist(), queue.ring.sequence_X[:size].tolist()
    return int(queue.digest()), list(zip(range(size), ids, sequence, strict=True))


def _contents() -> list[tuple[Any, Any]]:
    return [(_content(size), _replicated_content(size)) for size in (1, 2, 13, 60)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_shards_together_hold_what_every_rank_of_a_replicated_queue_does(ranks: int, run_ranks: Callable) -> None:
    by_rank = run_ranks(ranks, _contents)
    for content in by_rank:
        for number, (sharded, replicated) in enumerate(content):
            assert sharded == replicated
            assert replicated[0] == by_rank[0][number][1][0]


def _storage(size: int) -> tuple[int, int]:
    queue = FeatureQueue(size, 4, 2, sharded=True)
    return queue.ring.slots, queue.nbytes


def test_each_rank_stores_its_share(run_ranks: Callable) -> None:
    """11 slots on 4 ranks: 3, 3, 3 and 2, and each a dump row."""
    row = 2 * 4 * 4 + 4 + 8
    assert run_ranks(4, _storage, 11) == [(slots, (slots + 1) * row) for slots in (3, 3, 3, 2)]


def _nan() -> tuple[bool, bool]:
    queue = FeatureQueue(8, 3, 2, sharded=True)
    image, text, ids = make_rows(2, 3, rank())
    if rank() == 1:
        image[0] = torch.nan
    queue.commit([queue.gather(image, text, ids)])
    anchors, wanted, scale = torch.ones(1, 3), torch.tensor([77]), torch.zeros(())
    nan = bool(queue.lse(anchors, "image", wanted, scale).isnan().all())
    return nan, bool(queue.lse(anchors, "text", wanted, scale).isfinite().all())


def test_a_nan_on_one_shard_reaches_all(run_ranks: Callable) -> None:
    assert run_ranks(2, _nan) == [(True, True)] * 2


def _anchors_of_several_micro_steps(sharded: bool) -> Tensor:
    """As cached gradients bring them: all of a step's anchors at once, with its keys."""
    queue, pending = _filled(11, 4, torch.float64, sharded, "empty")
    anchors, _, ids = make_rows(2 * MAX_ROWS - rank(), 4, 70 + rank())
    anchors.requires_grad_()
    lse = queue.lse(anchors, "image", ids, torch.zeros((), dtype=torch.float64), current=pending)
    lse.sum().backward()
    assert anchors.grad is not None
    mean, count = queue.positive_means("image", ids, pending)
    return torch.cat([lse.detach()[:, None], anchors.grad, mean, count[:, None]], dim=1)


def test_more_anchors_than_one_micro_step_has(run_ranks: Callable) -> None:
    pairs = zip(*(run_ranks(3, _anchors_of_several_micro_steps, sharded) for sharded in (False, True)), strict=True)
    for replicated, sharded in pairs:
        torch.testing.assert_close(sharded, replicated, rtol=1e-12, atol=1e-13)


def test_fewer_rows_than_anchors_are_refused() -> None:
    with pytest.raises(ValueError, match="3 anchors, but buffers of 2 rows"):
        sharded_means(torch.zeros(1, 2), torch.zeros(1).int(), torch.zeros(3).int(), rows=2)


def test_an_upstream_inf_does_not_come_back_from_a_row_that_counts_nothing() -> None:
    queue = FeatureQueue(4, 3, 2, sharded=True)
    anchors, scale = torch.ones(2, 3, requires_grad=True), torch.zeros((), requires_grad=True)
    lse = queue.lse(anchors, "image", torch.tensor([1, 2]), scale)
    assert lse.tolist() == [-torch.inf] * 2
    gradients = torch.autograd.grad(lse, [anchors, scale], torch.full((2,), torch.inf))
    assert not gradients[0].any() and not gradients[1].any()
