"""The replicated queue: what it holds after any script of commits, and what its log-sum-exp counts."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reid_dist.kernels.contrastive import EMPTY, RANDOM
from reid_dist.models.queue import FeatureQueue, queue_ids
from tests.models.queue_cases import D, make_rows, push, raw_sha

Row = tuple[list[float], list[float], int]


def content(queue: FeatureQueue) -> list[Row | None]:
    """What each slot holds."""
    ring = queue.ring
    slots = zip(ring.image_XD.tolist(), ring.text_XD.tolist(), ring.ids_X.tolist(), strict=True)
    return [None if row[2] == EMPTY else row for row in slots][: queue.size]


# What the queue holds


@pytest.mark.parametrize("seed", range(40))
def test_any_script_of_commits_leaves_what_a_list_would(seed: int) -> None:
    """Any size and batches, empty ones and ones larger than the queue, one or several in a commit."""
    script = random.Random(seed)
    size = script.choice([1, 2, 3, 7, 16, 31, 101])
    max_rows = script.choice([1, 5, 2 * size + 3])
    queue = FeatureQueue(size, D, max_rows, dtype=torch.float64)
    model: list[Row] = []
    for step in range(script.randrange(1, 12)):
        staged = []
        for micro_step in range(script.choice([1, 1, 2, 4])):
            rows = make_rows(script.randrange(max_rows + 1), 1000 * seed + 10 * step + micro_step)
            staged.append(queue.gather(*rows))
            model += list(zip(*(x.tolist() for x in rows), strict=True))
        queue.commit(staged)
        expected: list[Row | None] = [None] * size
        for number, row in enumerate(model):
            expected[number % size] = row
        assert content(queue) == expected
        assert int(queue.ring.next) == len(model)
        newest = range(max(0, len(model) - size), len(model))
        assert {int(n) for n in queue.ring.sequence_X if n >= 0} == set(newest)
        assert bool(queue.ring.in_sequence())


def test_rows_with_a_negative_id_are_padding_wherever_they_stand() -> None:
    image, text, ids = make_rows(6, 0)
    ids[[0, 3, 5]] = torch.tensor([-1, -7, -1])
    queue, expected = (FeatureQueue(4, D, 6, dtype=torch.float64) for _ in range(2))
    push(queue, (image, text, ids))
    kept = torch.tensor([1, 2, 4])
    push(expected, (image[kept], text[kept], ids[kept]))
    assert raw_sha(queue) == raw_sha(expected)


def test_memory_that_was_never_written_is_zero_and_what_is_dropped_leaves_no_trace() -> None:
    """A NaN in a dropped row must not wait in storage: 0 * NaN is NaN in a kernel's product."""
    queue = FeatureQueue(3, D, 8)
    assert not queue.ring.image_XD.any() and not queue.ring.text_XD.any()
    image, text, ids = make_rows(8, 1)
    image[0], text[1] = torch.nan, torch.inf  # two of the five that are too many
    push(queue, (image, text, ids))
    padding = torch.full_like(ids, -1)
    pending = push(queue, (torch.full_like(image, torch.nan), torch.full_like(text, torch.nan), padding))
    assert not pending.wait()[0].any() and not pending.wait()[1].any()
    assert queue.ring.image_XD.isfinite().all() and queue.ring.text_XD.isfinite().all()
    assert not queue.ring.image_XD[3:].any() and queue.ring.ids_X[3:].tolist() == [EMPTY]


def test_gathered_keys_are_copies_in_the_queue_s_dtype_without_gradient() -> None:
    queue = FeatureQueue(4, D, 3, dtype=torch.bfloat16)
    image, text, ids = make_rows(2, 2)
    image.requires_grad_()
    pending = queue.gather(image, text, ids)
    expected = image.detach().bfloat16()
    with torch.no_grad():
        image.zero_()
    image_G, text_G, ids_G = pending.wait()
    assert (image_G.dtype, text_G.dtype, ids_G.dtype) == (torch.bfloat16, torch.bfloat16, torch.int32)
    assert image_G[:2].equal(expected) and not image_G[2].any() and not image_G.requires_grad
    assert ids_G.tolist() == [*ids.tolist(), EMPTY]
    assert pending.wait()[0] is image_G


def test_calls_that_do_not_fit_are_refused() -> None:
    queue = FeatureQueue(4, D, 3)
    with pytest.raises(ValueError, match=r"4 rows to gather, but this queue was made for max_rows=3"):
        queue.gather(*make_rows(4, 0))
    image, text, ids = make_rows(3, 0)
    with pytest.raises(ValueError, match=r"text keys have shape \(2, 5\); expected \(3, 5\)"):
        queue.gather(image, text[:2], ids)
    with pytest.raises(ValueError, match=r"image keys have shape \(3, 4\)"):
        queue.gather(image[:, :4], text, ids)
    with pytest.raises(ValueError, match="size 0"):
        FeatureQueue(0, D, 3)


def test_identities_beyond_31_bits_stay_apart_and_small_ones_stay_themselves() -> None:
    """A stream numbers its pairs tar * 2^32 + number: cutting to 32 bits would merge the tars."""
    small = torch.tensor([0, 1, 2**31 - 1, -1, -9])
    assert queue_ids(small).tolist() == [0, 1, 2**31 - 1, EMPTY, EMPTY]
    streamed = (torch.arange(200)[:, None] * 2**32 + torch.arange(500)).flatten()[500:]
    folded = queue_ids(streamed)
    assert folded.dtype == torch.int32 and bool((folded >= 0).all())
    # Of n random 31-bit numbers n^2 / 2^32 pairs collide: 2.3 of these 99500.
    assert len(set(folded.tolist())) > len(streamed) - 15
    assert queue_ids(torch.tensor([3], dtype=torch.int32)).tolist() == [3]


def test_random_start_is_as_published_and_counts_until_overwritten() -> None:
    queue = FeatureQueue(6, D, 4, init="random_as_published", seed=1)
    image, text = queue.ring.image_XD[:6], queue.ring.text_XD[:6]
    for keys in (image, text):
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(6))
        assert bool((keys >= 0).all()) and len(keys.unique()) == keys.numel()
    assert not image.equal(text)
    assert not image.equal(FeatureQueue(6, D, 4, init="random_as_published", seed=2).ring.image_XD[:6])
    assert queue.ring.ids_X[:6].tolist() == [RANDOM] * 6 and bool(queue.ring.in_sequence())
    rows = make_rows(4, 3)
    push(queue, rows)
    assert queue.ring.ids_X[:6].tolist() == [*rows[2].tolist(), RANDOM, RANDOM] and bool(queue.ring.in_sequence())
    anchors = make_rows(3, 4)
    found = queue.lse(anchors[0].float(), "text", anchors[2], torch.tensor(0.5), mask="none")
    logits = anchors[0] @ queue.ring.text_XD[:6].double().T * torch.tensor(0.5).double().exp()
    torch.testing.assert_close(found, logits.logsumexp(1).float())


# The log-sum-exp


def brute_force(
    queue: FeatureQueue, modality: str, anchors: Tensor, ids: Tensor, scale: Tensor, *, mask: str, batch_ids: list[int]
) -> Callable[[list[Row]], Tensor]:
    """Row by row in float64 from lists; the function that it returns takes rows that are counted too."""
    stored = [row for row in content(queue) if row is not None]
    counts = {
        "none": lambda own, key: key not in batch_ids,
        "identity": lambda own, key: own != key,
        "positives": lambda own, key: own == key,
    }

    def lse(extra: list[Row]) -> Tensor:
        found = []
        for anchor, own in zip(anchors, ids.tolist(), strict=True):
            keys = [row[modality == "text"] for row in [*stored, *extra] if counts[mask](own, row[2])]
            logits = [scale.exp() * anchor @ torch.tensor(key, dtype=torch.float64) for key in keys]
            found.append(torch.stack(logits).logsumexp(0) if logits else anchor.sum() * 0 - torch.inf)
        return torch.stack(found)

    return lse


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("mask", ["identity", "none", "positives", "batch"])
@pytest.mark.parametrize(("filled", "max_rows"), [(0, 4), (3, 1), (11, 4), (40, 5)])
def test_lse_counts_the_queue_and_the_current_keys(modality: str, mask: str, filled: int, max_rows: int) -> None:
    queue = FeatureQueue(11, D, max_rows, dtype=torch.float64)
    queue.commit([queue.gather(*(x[row : row + 1] for x in make_rows(filled, 1))) for row in range(filled)])
    steps = [make_rows(1, 2), make_rows(0, 3), make_rows(max_rows, 4)]  # the last row of storage is no padding
    current = [queue.gather(*rows) for rows in steps]
    image, _, ids = make_rows(6, 5)
    anchors = image.requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    how: dict = {"mask": "none", "batch_ids_U": ids[:2]} if mask == "batch" else {"mask": mask}
    left_out = ids[:2].tolist() if mask == "batch" else []
    oracle = brute_force(queue, modality, anchors, ids, scale, mask=how["mask"], batch_ids=left_out)
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64)
    for used in (range(0), range(1), range(3), range(1, 3), range(2, 3), range(0)):
        pending = [current[i] for i in used]
        extra = [row for i in used for row in zip(*(x.tolist() for x in steps[i]), strict=True)]
        results = []
        for lse in (
            queue.lse(anchors, modality, ids, scale, current=pending, **how),  # type: ignore[arg-type]
            oracle(extra),
        ):
            finite = lse.isfinite()
            gradients = torch.autograd.grad((lse * weight)[finite].sum(), [anchors, scale], materialize_grads=True)
            results.append([lse.detach().masked_fill(~finite, -1e9), *gradients])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
def test_commit_and_other_current_keys_between_forward_and_backward_change_no_gradient(backend: str) -> None:
    def gradient(disturb: bool) -> Tensor:
        queue = FeatureQueue(9, D, 6)
        push(queue, make_rows(6, 1))
        image, _, ids = make_rows(4, 2)
        anchors = image.float().requires_grad_()
        current = queue.gather(*make_rows(6, 3))
        lse = queue.lse(anchors, "text", ids, torch.zeros(()), current=[current], backend=backend)  # type: ignore[arg-type]
        if disturb:
            other = queue.gather(*make_rows(5, 4))
            queue.lse(anchors, "text", ids, torch.zeros(()), current=[other, other], backend=backend)  # type: ignore[arg-type]
            queue.commit([current, other])
        lse.sum().backward()
        assert anchors.grad is not None
        return anchors.grad

    assert gradient(True).equal(gradient(False))


def test_positive_means_are_those_of_a_loop() -> None:
    queue = FeatureQueue(12, D, 20, dtype=torch.float64)
    push(queue, make_rows(20, 1, identities=4))
    extra = make_rows(3, 2, identities=6)
    wanted = torch.tensor([5, 0, 3, 0, 6, 2])
    for current in ([], [queue.gather(*extra)]):
        rows = [row for row in content(queue) if row is not None]
        rows += list(zip(*(x.tolist() for x in extra), strict=True)) if current else []
        mean, count = queue.positive_means("text", wanted, current)
        for of, found, number in zip(wanted.tolist(), mean, count.tolist(), strict=True):
            own = [torch.tensor(row[1], dtype=torch.float64) for row in rows if row[2] == of]
            assert number == len(own)
            torch.testing.assert_close(found, torch.stack(own).mean(0) if own else torch.zeros(D).double())


def test_a_nan_key_is_seen_while_it_is_in_the_queue_and_not_after() -> None:
    queue = FeatureQueue(4, D, 4)
    image, text, ids = make_rows(4, 1)
    image[2, 3] = torch.nan
    push(queue, (image, text, ids))
    anchors = torch.ones(1, D)
    wanted = torch.tensor([50])
    assert queue.lse(anchors, "image", wanted, torch.zeros(())).isnan().all()
    assert queue.lse(anchors, "text", wanted, torch.zeros(())).isfinite().all()
    push(queue, make_rows(4, 2))
    assert queue.lse(anchors, "image", wanted, torch.zeros(())).isfinite().all()


def test_a_step_needs_nothing_from_the_device() -> None:
    """Fake tensors have no values: whatever would bring one to the host fails."""
    with FakeTensorMode():
        queue = FeatureQueue(11, D, 4, init="empty")
        for current in (True, False):
            image, text, ids = torch.randn(3, D), torch.randn(3, D), torch.randint(9, (3,))
            anchors, scale = torch.randn(3, D, requires_grad=True), torch.zeros((), requires_grad=True)
            pending = queue.gather(image, text, ids)
            lse = queue.lse(anchors, "image", ids, scale, current=[pending] if current else [])
            lse = lse + queue.lse(anchors, "text", ids, scale, mask="none", batch_ids_U=pending.wait()[2])
            queue.positive_means("image", ids)
            lse.sum().backward()
            queue.commit([pending])
            queue.digest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_never_waits_and_stores_what_the_cpu_does() -> None:
    digests = []
    for device in ("cpu", "cuda"):
        queue = FeatureQueue(11, D, 4, device=device, dtype=torch.bfloat16, init="random_as_published")
        scale = torch.zeros((), device=device)
        inputs = [[x.to(device) for x in make_rows(rows, rows)] for rows in (4, 3, 0, 4)]
        for image, text, ids in inputs:
            torch.cuda.set_sync_debug_mode("error")
            try:
                pending = queue.gather(image, text, ids)
                anchors = image.float().requires_grad_()
                queue.lse(anchors, "text", ids, scale, current=[pending]).sum().backward()
                queue.commit([pending])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        digests.append(int(queue.digest()))
    assert digests[0] == digests[1]


def test_what_owns_a_queue_does_not_export_it() -> None:
    """Its content is personal data; the state of a module is what exports and DeepSpeed save."""
    owner = torch.nn.Linear(2, 1)
    owner.queue = FeatureQueue(4, D, 2)  # type: ignore[assignment]
    assert list(owner.state_dict()) == ["weight", "bias"]


def test_storage_is_what_it_says() -> None:
    queue = FeatureQueue(100, D, 10, dtype=torch.bfloat16)
    assert queue.nbytes == 101 * (2 * 2 * D + 4 + 8)
    assert queue.ring.keys("image")[0].is_contiguous() and queue.ring.keys("image")[0].shape == (100, D)


def test_normalised_features_of_a_model_keep_their_products() -> None:
    """bf16 storage rounds each key once: products with it are those of the rounded key, in fp32."""
    queue = FeatureQueue(8, 32, 8, dtype=torch.bfloat16)
    image, text, ids = make_rows(8, 1, features=32)
    image, text = F.normalize(image), F.normalize(text)
    push(queue, (image, text, ids))
    anchors = F.normalize(make_rows(4, 2, features=32)[0]).bfloat16()
    found = queue.lse(anchors, "image", torch.full((4,), 99), torch.tensor(2.0))
    logits = anchors.double() @ image.bfloat16().double().T * torch.tensor(2.0).double().exp()
    torch.testing.assert_close(found.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
