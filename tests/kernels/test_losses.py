"""Each loss beside its paper's formula, written as loops over Python's floats; and its gradients by differences."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels.contrastive import (
    EMPTY,
    clip_contrastive,
    moco_from_lse,
    moco_nce,
    pair_attend,
    pair_moments,
    queue_attend,
    sdm,
    siglip,
    supcon_queue,
)

BACKENDS = ("reference", "chunked")
pytestmark = pytest.mark.usefixtures("small_tiles")


def logits_by_loops(rows: Tensor, columns: Tensor, log_scale: Tensor) -> list[list[float]]:
    scale = math.exp(float(log_scale))
    return [
        [scale * math.fsum(x * y for x, y in zip(a, c, strict=True)) for c in columns.tolist()] for a in rows.tolist()
    ]


def assert_losses(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.fixture
def pair_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows, columns, row ids, column ids, log_scale) in float64, 13 and 17 rows, ids that repeat."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = (F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1) for n in (13, 17))
    row_ids, column_ids = (torch.randint(6, (n,), generator=generator, dtype=torch.int32) for n in (13, 17))
    return rows, columns, row_ids, column_ids, torch.tensor(2.0, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moco_is_infonce_of_one_positive(queue_case: Callable, backend: str) -> None:
    case = queue_case(11, 37, 5, dtype=torch.float64, people=6)
    negatives = logits_by_loops(case.anchors_BD, case.keys_KD, case.log_scale)
    positives = logits_by_loops(case.anchors_BD, case.positives_BD, case.log_scale)
    expected = []
    for i, own in enumerate(case.anchor_ids_B.tolist()):
        kept = [s for s, j in zip(negatives[i], case.key_ids_K.tolist(), strict=True) if j not in (EMPTY, own)]
        positive = math.exp(positives[i][i])
        expected.append(-math.log(positive / (positive + math.fsum(map(math.exp, kept)))))
    assert_losses(moco_nce(*case, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_textreid_loss_number_for_number(queue_case: Callable, backend: str) -> None:
    """CM-MoCo, step 4 and 5: one set of negatives for all anchors, without the identities of the whole batch."""
    image = queue_case(9, 41, 6, dtype=torch.float64, people=12, seed=1)
    text = queue_case(9, 41, 6, dtype=torch.float64, people=12, seed=2)
    ids, queue_ids, temperature = image.anchor_ids_B, image.key_ids_K, math.exp(-float(image.log_scale))
    # Image anchors a_v against text keys k_t and the text queue; text anchors against image keys.
    directions = [
        (image.anchors_BD, text.positives_BD, text.keys_KD),
        (text.anchors_BD, image.positives_BD, image.keys_KD),
    ]
    expected = found = 0.0
    for anchors, keys, queue in directions:
        for i in range(9):
            positive = math.exp(float(anchors[i] @ keys[i]) / temperature)
            negative = 0.0
            for j in range(41):
                if queue_ids[j] != EMPTY and not any(queue_ids[j] == y for y in ids):
                    negative += math.exp(float(anchors[i] @ queue[j]) / temperature)
            expected -= math.log(positive / (positive + negative)) / 9
        arguments = (anchors, keys, queue, ids, queue_ids, image.log_scale)
        found += float(moco_nce(*arguments, mask="none", batch_ids_U=ids, backend=backend).mean())
    assert found == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_supcon_averages_over_the_positives_outside_the_logarithm(queue_case: Callable, backend: str) -> None:
    case = queue_case(11, 37, 5, dtype=torch.float64, people=12)
    logits = logits_by_loops(case.anchors_BD, case.keys_KD, case.log_scale)
    expected = []
    for i, own in enumerate(case.anchor_ids_B.tolist()):
        kept = [(s, j) for s, j in zip(logits[i], case.key_ids_K.tolist(), strict=True) if j != EMPTY]
        total = math.fsum(math.exp(s) for s, _ in kept)
        terms = [-math.log(math.exp(s) / total) for s, j in kept if j == own]
        expected.append(math.fsum(terms) / len(terms) if terms else 0.0)
    assert 0.0 in expected
    assert_losses(supcon_queue(*case.attend(), backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["identity", "none", "positives"])
def test_pairs_are_summed_over_rows_and_over_columns(pair_inputs: tuple, backend: str, mask: str) -> None:
    rows, columns, row_ids, column_ids, log_scale = pair_inputs
    row_ids[4] = column_ids[3] = column_ids[16] = EMPTY
    logits = logits_by_loops(rows, columns, log_scale)

    def lse(pairs: list[tuple[int, int]]) -> float:
        kept = []
        for i, j in pairs:
            same = row_ids[i] == column_ids[j]
            if EMPTY not in (row_ids[i], column_ids[j]) and {"identity": not same, "positives": same}.get(mask, True):
                kept.append(math.exp(logits[i][j]))
        return math.log(math.fsum(kept)) if kept else -math.inf

    found = pair_attend(
        rows, columns, log_scale, row_ids_B=row_ids, column_ids_G=column_ids, mask=mask, backend=backend
    )
    assert_losses(found[0], [lse([(i, j) for j in range(17)]) for i in range(13)])
    assert_losses(found[1], [lse([(i, j) for i in range(13)]) for j in range(17)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_without_ids_all_count(pair_inputs: tuple, backend: str) -> None:
    rows, columns, _, _, log_scale = pair_inputs
    row_lse, column_lse = pair_attend(rows, columns, log_scale, backend=backend)
    logits = log_scale.exp() * rows @ columns.T
    torch.testing.assert_close((row_lse, column_lse), (logits.logsumexp(1), logits.logsumexp(0)))
    with pytest.raises(ValueError, match="one side only"):
        pair_attend(rows, columns, log_scale, row_ids_B=torch.zeros(13, dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("identities", [False, True])
def test_clip_is_cross_entropy_in_both_directions(pair_inputs: tuple, backend: str, identities: bool) -> None:
    image, text, ids, _, log_scale = pair_inputs
    text = text[:13]
    logits = log_scale.exp() * image @ text.T
    target = (ids[:, None] == ids[None, :]).double() if identities else torch.eye(13, dtype=torch.float64)
    target /= target.sum(dim=1, keepdim=True)
    expected = (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    ) / 2
    found = clip_contrastive(image, text, log_scale, ids if identities else None, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sdm_is_the_formula_of_irra(pair_inputs: tuple, backend: str) -> None:
    rows, columns, row_ids, column_ids, log_scale = pair_inputs
    logits = logits_by_loops(rows, columns, log_scale)

    def direction(logits: list[list[float]], own: list[int], other: list[int], epsilon: float) -> float:
        loss = 0.0
        for i, line in enumerate(logits):
            total = math.fsum(map(math.exp, line))
            positives = sum(y == own[i] for y in other)
            for j, s in enumerate(line):
                p, q = math.exp(s) / total, (own[i] == other[j]) / max(1, positives)
                loss += p * (math.log(p) - math.log(q + epsilon))
        return loss / len(logits)

    transposed = [list(column) for column in zip(*logits, strict=True)]
    for epsilon in (1e-8, 1e-3):
        expected = direction(logits, row_ids.tolist(), column_ids.tolist(), epsilon)
        expected += direction(transposed, column_ids.tolist(), row_ids.tolist(), epsilon)
        found = sdm(rows, columns, row_ids, column_ids, log_scale, epsilon, backend=backend)
        assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_sums_over_each_softmax(pair_inputs: tuple, backend: str) -> None:
    rows, columns, row_ids, column_ids, log_scale = pair_inputs
    row_ids[4] = column_ids[3] = EMPTY
    logits = log_scale.exp() * rows @ columns.T
    logits[4], logits[:, 3] = -torch.inf, -torch.inf
    same = row_ids[:, None] == column_ids[None, :]
    found = pair_moments(rows, columns, row_ids, column_ids, log_scale, backend=backend)
    for moments, x, positive in ((found[0], logits, same), (found[1], logits.T, same.T)):
        for i in range(len(x)):
            p = x[i].softmax(0).nan_to_num(0.0)
            expected = [x[i].logsumexp(0), torch.special.xlogy(p, p).sum(), p[positive[i]].sum(), p[~positive[i]].sum()]
            torch.testing.assert_close(moments[:, i], torch.stack(expected), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_siglip_is_a_logistic_loss_of_every_pair(pair_inputs: tuple, backend: str) -> None:
    rows, columns, row_ids, column_ids, log_scale = pair_inputs
    row_ids[4] = column_ids[3] = EMPTY
    bias = torch.tensor(-3.0, dtype=torch.float64)
    logits = logits_by_loops(rows, columns, log_scale)
    expected = []
    for i in range(13):
        pairs = [j for j in range(17) if EMPTY not in (row_ids[i], column_ids[j])]
        signs = [1 if row_ids[i] == column_ids[j] else -1 for j in pairs]
        expected.append(
            math.fsum(
                -math.log(1 / (1 + math.exp(-z * (logits[i][j] - 3.0)))) for z, j in zip(signs, pairs, strict=True)
            )
        )
    assert_losses(siglip(rows, columns, row_ids, column_ids, log_scale, bias, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_have_no_part_in_pair_losses(pair_inputs: tuple, backend: str) -> None:
    rows, columns, row_ids, column_ids, log_scale = pair_inputs
    bias = torch.tensor(-3.0, dtype=torch.float64)
    padded_ids, padded = (
        torch.cat([column_ids, torch.full((3,), EMPTY, dtype=torch.int32)]),
        torch.full((3, 5), torch.nan),
    )
    padded = torch.cat([columns, padded.double()]).requires_grad_()
    scale = log_scale.clone().requires_grad_()
    for loss in (
        lambda c, ids, s: sdm(rows, c, row_ids, ids, s, backend=backend),
        lambda c, ids, s: siglip(rows, c, row_ids, ids, s, bias, backend=backend).sum(),
    ):
        found = loss(padded, padded_ids, scale)
        torch.testing.assert_close(found.detach(), loss(columns, column_ids, log_scale))
        gradient, by_scale = torch.autograd.grad(found, (padded, scale))
        assert (gradient[17:] == 0).all() and by_scale.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["moco", "batch", "supcon", "clip", "clip_ids", "pairs", "sdm", "siglip"])
def test_gradients_are_those_of_differences(queue_case: Callable, pair_inputs: tuple, backend: str, name: str) -> None:
    case = queue_case(6, 23, 5, dtype=torch.float64, people=4).leaves()
    rows, columns, row_ids, column_ids, _ = pair_inputs
    rows, columns = rows[:6].clone().requires_grad_(), columns[:9].clone().requires_grad_()
    row_ids, column_ids = row_ids[:6], column_ids[:9]
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    rest = (case.positives_BD, case.keys_KD, case.anchor_ids_B, case.key_ids_K)
    queue_losses = {
        "moco": lambda a, s: moco_nce(a, *rest, s, backend=backend),
        "batch": lambda a, s: moco_nce(a, *rest, s, mask="none", batch_ids_U=case.anchor_ids_B, backend=backend),
        "supcon": lambda a, s: supcon_queue(a, *rest[1:], s, backend=backend),
    }
    pair_losses = {
        "clip": lambda a, c, s: clip_contrastive(a, c[:6], s, backend=backend),
        "clip_ids": lambda a, c, s: clip_contrastive(a, c[:6], s, row_ids, backend=backend),
        "pairs": lambda a, c, s: pair_attend(a, c, s, backend=backend),
        "sdm": lambda a, c, s: sdm(a, c, row_ids, column_ids, s, backend=backend),
    }
    if name in queue_losses:
        assert torch.autograd.gradcheck(queue_losses[name], (case.anchors_BD, case.log_scale))
    elif name == "siglip":
        inputs = (rows, columns, case.log_scale, bias)
        assert torch.autograd.gradcheck(
            lambda a, c, s, b: siglip(a, c, row_ids, column_ids, s, b, backend=backend), inputs
        )
    else:
        assert torch.autograd.gradcheck(pair_losses[name], (rows, columns, case.log_scale))


def test_moco_from_lse_is_the_last_line_of_moco(queue_case: Callable) -> None:
    case = queue_case(dtype=torch.float64)
    lse = queue_attend(*case.attend())
    found = moco_from_lse(case.anchors_BD, case.positives_BD, lse, case.log_scale)
    torch.testing.assert_close(found, moco_nce(*case), rtol=1e-14, atol=0)


def test_positives_that_want_a_gradient_are_refused(queue_case: Callable) -> None:
    case = queue_case()
    with pytest.raises(ValueError, match="positives want a gradient"):
        moco_nce(*case._replace(positives_BD=case.positives_BD.clone().requires_grad_()))
