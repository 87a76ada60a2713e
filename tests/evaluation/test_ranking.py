"""Ranking metrics against a double loop, and every rule of the protocol on hand-made cases."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.evaluation.ranking import (
    METRIC_KEYS,
    QueryRanks,
    Retrieval,
    i2i_metrics,
    rank_metrics,
    rank_queries,
    summarise,
    t2i_metrics,
    top_matches,
)


def ranked(*tensors: Tensor, normalise: bool = True) -> QueryRanks:
    return rank_queries(Retrieval(*tensors, normalise=normalise))


Labels = tuple[Tensor, Tensor, Tensor, Tensor]


def oracle_order(sim: list[float], positive: list[bool], kept: list[bool]) -> list[bool]:
    """Relevance list of one query in pessimistic order, by an ordinary full sort."""
    entries = [(-s, p) for s, p, k in zip(sim, positive, kept, strict=True) if k]
    return [p for _, p in sorted(entries)]  # False < True: negatives first among equals


def oracle(sim_QG: Tensor, labels: Labels, cameras: bool) -> dict[str, float]:
    """The metrics by a double loop over queries and gallery, written as the papers write them."""
    qp, gp, qc, gc = (one.tolist() for one in labels)
    rows = []
    for q, sims in enumerate(sim_QG.tolist()):
        positive = [pid == qp[q] for pid in gp]
        kept = [not (cameras and p and gc[g] == qc[q] and qc[q] >= 0) for g, p in enumerate(positive)]
        order = oracle_order(sims, positive, kept)
        hits = [i + 1 for i, hit in enumerate(order) if hit]
        if hits:
            ap = sum((n + 1) / place for n, place in enumerate(hits)) / len(hits)
            tied = any(
                sims[a] == sims[b] and positive[a] and not positive[b]
                for a in range(len(sims))
                for b in range(len(sims))
                if kept[a] and kept[b]
            )
            rows.append(
                (
                    *(float(hits[0] <= k) for k in (1, 5, 10)),
                    ap,
                    len(hits) / hits[-1],
                    float(tied),
                )
            )
    means = [100 * sum(column) / len(rows) for column in zip(*rows, strict=True)]
    keys = (*METRIC_KEYS, "tied")
    return dict(zip(keys, means, strict=True)) | {
        "queries": len(rows),
        "skipped": len(qp) - len(rows),
    }


def problem(
    q: int, g: int, d: int, ids: int, cameras: int, seed: int, integer: bool = False
) -> tuple[Tensor, Tensor, Labels]:
    make = torch.Generator().manual_seed(seed)

    def features(n: int) -> Tensor:
        if integer:
            return torch.randint(-2, 3, (n, d), generator=make).float()
        return torch.randn(n, d, generator=make)

    def labels(n: int, high: int) -> Tensor:
        return torch.randint(0, high, (n,), generator=make)

    query, gallery = features(q), features(g)
    return (
        query,
        gallery,
        (labels(q, ids), labels(g, ids), labels(q, cameras), labels(g, cameras)),
    )


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double()).float().double()


@pytest.mark.parametrize("cameras", [False, True])
@pytest.mark.parametrize(
    ("q", "g", "d", "ids", "cams"),
    [
        (1, 1, 3, 1, 5),
        (7, 3, 5, 2, 2),
        (33, 57, 17, 9, 3),
        (61, 201, 8, 40, 4),
        (5, 40, 6, 200, 6),
        (20, 9, 4, 1, 2),
    ],
)
@pytest.mark.parametrize("integer", [False, True])
def test_equals_double_loop(cameras: bool, q: int, g: int, d: int, ids: int, cams: int, integer: bool) -> None:
    query, gallery, labels = problem(q, g, d, ids, cams, seed=q * 1000 + g, integer=integer)
    # Inner products of small integers: ties are plenty and exact.
    sim = query @ gallery.T if integer else (unit(query) @ unit(gallery).T).float()
    used = labels if cameras else labels[:2]
    try:
        expected = oracle(sim, labels, cameras)
    except ValueError:  # the oracle found no valid query
        with pytest.raises(UserError, match="none of the"):
            rank_metrics(query, gallery, *used, normalise=not integer)
        return
    got = rank_metrics(query, gallery, *used, normalise=not integer)
    assert got == pytest.approx(expected, abs=1e-9)
    if integer and g > 50:
        assert got["tied"] > 50


def test_pessimistic_ties_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    got = t2i_metrics(query, gallery, torch.tensor([7]), torch.tensor([7, 1, 2, 3]))
    # Optimistic order would give R1 100 and mAP 100; two equal negatives come first here.
    assert got["R1"] == 0 and got["R5"] == 100 and got["mAP"] == pytest.approx(100 / 3) and got["tied"] == 100
    clear = t2i_metrics(query, gallery, torch.tensor([3]), torch.tensor([7, 1, 2, 3]))
    assert clear["tied"] == 0 and clear["mAP"] == pytest.approx(25)


def test_identical_images_tie_exactly() -> None:
    make = torch.Generator().manual_seed(0)
    query, one = torch.randn(50, 37, generator=make), torch.randn(1, 37, generator=make)
    gallery = torch.cat([one, torch.randn(90, 37, generator=make), one])
    pid = torch.arange(92)
    ranks = ranked(query, gallery, torch.zeros(50), pid)
    assert bool(ranks.tied_Q.all())


def test_permutation_of_both_sides_changes_no_bit() -> None:
    query, gallery, labels = problem(40, 90, 12, 15, 3, seed=3, integer=True)
    want = rank_metrics(query, gallery, *labels)
    make = torch.Generator().manual_seed(5)
    for _ in range(5):
        a, b = torch.randperm(40, generator=make), torch.randperm(90, generator=make)
        assert (
            rank_metrics(
                query[a],
                gallery[b],
                labels[0][a],
                labels[1][b],
                labels[2][a],
                labels[3][b],
            )
            == want
        )


def test_one_identity_with_many_images_is_counted_otherwise_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery, labels = problem(30, 500, 6, 3, 3, seed=9, integer=True)
    monkeypatch.setattr("reid_dist.evaluation.counting._MANY", 10**6)
    one_by_one = ranked(query, gallery, *labels, normalise=False).table()
    monkeypatch.setattr("reid_dist.evaluation.counting._MANY", 0)
    assert torch.equal(ranked(query, gallery, *labels, normalise=False).table(), one_by_one)


def test_interpolated_precision() -> None:
    # Positives at places 1, 3 and 4 of 4: precision 1, 2/3, 3/4 at recall 1/3, 2/3, 1.
    gallery = torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None]
    found = ranked(torch.ones(1, 1), gallery, torch.tensor([1]), torch.tensor([1, 0, 1, 1]), normalise=False)
    assert found.precision_QR.tolist() == [[1.0] * 4 + [0.75] * 7]
    nobody = ranked(torch.ones(1, 1), gallery, torch.tensor([9]), torch.tensor([1, 0, 1, 1]))
    assert nobody.precision_QR.tolist() == [[0.0] * 11]


def test_interpolated_precision_is_the_greatest_at_that_recall_or_above() -> None:
    query, gallery, labels = problem(25, 90, 5, 4, 3, seed=10)
    similarity_QG = (unit(query) @ unit(gallery).T).float()
    found = ranked(query, gallery, *labels[:2]).precision_QR
    for q in range(25):
        right = (labels[1] == labels[0][q])[similarity_QG[q].argsort(descending=True)].tolist()
        points = [(sum(right[: i + 1]) / sum(right), sum(right[: i + 1]) / (i + 1)) for i in range(90) if right[i]]
        want = [max(precision for recall, precision in points if recall >= t / 10 - 1e-12) for t in range(11)]
        assert found[q].tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("shards", [2, 4, 7])
def test_queries_split_over_ranks_change_no_bit(shards: int) -> None:
    query, gallery, (qp, gp, qc, gc) = problem(41, 90, 12, 15, 3, seed=8)
    parts = [ranked(query[r::shards], gallery, qp[r::shards], gp, qc[r::shards], gc) for r in range(shards)]
    whole = QueryRanks.from_table(torch.cat([part.table() for part in parts]))
    assert summarise(whole) == rank_metrics(query, gallery, qp, gp, qc, gc)


def test_distractors_never_raise_ap() -> None:
    query, gallery, (qp, gp, qc, gc) = problem(30, 60, 6, 10, 3, seed=11)
    before = ranked(query, gallery, qp, gp, qc, gc)
    more = torch.cat([gallery, torch.randn(25, 6, generator=torch.Generator().manual_seed(1))])
    after = ranked(
        query,
        more,
        qp,
        torch.cat([gp, torch.full((25,), 999)]),
        qc,
        torch.cat([gc, torch.zeros(25).long()]),
    )
    assert bool((after.ap_Q <= before.ap_Q).all()) and bool((after.ap_Q < before.ap_Q).any())
    assert bool((after.first_Q >= before.first_Q).all()) and torch.equal(after.positives_Q, before.positives_Q)


def test_same_camera_entries_are_removed_for_images_only() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.7, 0.7]])
    pid, camid = torch.tensor([4, 5, 4, 4]), torch.tensor([0, 0, 1, 2])
    got = i2i_metrics(query, gallery, torch.tensor([4]), pid, torch.tensor([0]), camid)
    # Order: (same camera removed), negative, hit, hit.
    assert got["R1"] == 0 and got["mAP"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert got["mINP"] == pytest.approx(100 * 2 / 3)
    text = t2i_metrics(query, gallery, torch.tensor([4]), pid)
    assert text["R1"] == 100 and text["mAP"] == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 3)


def test_unknown_camera_removes_nothing() -> None:
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    one = torch.tensor([4])
    got = i2i_metrics(
        query,
        gallery,
        one,
        torch.tensor([4, 5]),
        torch.tensor([-1]),
        torch.tensor([-1, -1]),
    )
    assert got["R1"] == 100 and got["skipped"] == 0


def test_queries_without_positive_are_skipped_and_counted() -> None:
    query, gallery = torch.eye(3), torch.eye(3)
    pid, camid = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])
    got = i2i_metrics(query, gallery, torch.tensor([0, 9, 2]), pid, torch.tensor([1, 1, 0]), camid)
    assert got["queries"] == 1 and got["skipped"] == 2 and got["R1"] == 100  # one absent, one all same camera
    assert all(math.isfinite(value) for value in got.values())


def test_rectangular_ap_is_not_trapezoidal() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    got = t2i_metrics(query, gallery, torch.tensor([1]), torch.tensor([0, 1, 1]))
    rectangular = (1 / 2 + 2 / 3) / 2
    trapezoidal = ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert got["mAP"] == pytest.approx(100 * rectangular) and abs(rectangular - trapezoidal) > 0.1


def test_gallery_smaller_than_ten() -> None:
    query, gallery, labels = problem(50, 4, 6, 3, 9, seed=2)
    got = rank_metrics(query, gallery, *labels)
    assert got["R5"] == got["R10"] == 100


def test_image_to_text_is_the_transposed_matrix() -> None:
    text, image, labels = problem(31, 23, 7, 6, 2, seed=6)
    got = rank_metrics(image, text, labels[1], labels[0])
    sim = (unit(image) @ unit(text).T).float()
    expected = oracle(sim, (labels[1], labels[0], labels[3], labels[2]), cameras=False)
    assert got == pytest.approx(expected, abs=1e-9)


def test_all_images_of_the_identity_are_relevant_with_uneven_captions() -> None:
    image = torch.eye(4)
    image_pid = torch.tensor([0, 0, 1, 2])
    text, text_pid = (
        image[[0, 1, 1, 1, 2, 3]] * 3,
        image_pid[[0, 1, 1, 1, 2, 3]],
    )  # 1, 3, 1 and 1 captions
    ranks = ranked(text, image, text_pid, image_pid)
    assert ranks.positives_Q.tolist() == [
        2,
        2,
        2,
        2,
        1,
        1,
    ]  # not the paired image alone
    # The second image of identity 0 ties with both negatives and comes after them.
    assert ranks.ap_Q.tolist() == pytest.approx([(1 + 2 / 4) / 2] * 4 + [1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_features_are_scored_in_fp32(dtype: torch.dtype) -> None:
    query, gallery, labels = problem(40, 90, 12, 15, 3, seed=3)
    query, gallery = query.to(dtype), gallery.to(dtype)
    assert rank_metrics(query, gallery, *labels) == rank_metrics(query.float(), gallery.float(), *labels)


def test_normalise_is_a_switch() -> None:
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    pids = (torch.tensor([0]), torch.tensor([0, 1]))
    assert rank_metrics(query, gallery, *pids)["R1"] == 100
    assert rank_metrics(query, gallery, *pids, normalise=False)["R1"] == 0


@pytest.mark.parametrize(("side", "value"), [("query", math.nan), ("gallery", math.inf)])
def test_broken_features_name_side_and_row(side: str, value: float) -> None:
    features = {"query": torch.ones(3, 2), "gallery": torch.ones(5, 2)}
    features[side][2, 1] = value
    with pytest.raises(UserError, match=f"{side} feature row 2"):
        rank_metrics(features["query"], features["gallery"], torch.zeros(3), torch.zeros(5))


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 0 queries"):
        rank_metrics(torch.ones(0, 2), torch.ones(3, 2), torch.zeros(0), torch.zeros(3))
    with pytest.raises(UserError, match="none of the 2 queries"):
        rank_metrics(torch.ones(2, 2), torch.ones(3, 2), torch.ones(2), torch.zeros(3))
    with pytest.raises(UserError, match="gallery is empty"):
        rank_metrics(torch.ones(2, 2), torch.ones(0, 2), torch.ones(2), torch.zeros(0))


def test_wrong_calls_are_refused() -> None:
    x, pid = torch.ones(2, 2), torch.zeros(2)
    with pytest.raises(ValueError, match="both"):
        rank_metrics(x, x, pid, pid, pid)
    with pytest.raises(ValueError, match="gallery_pid_G"):
        rank_metrics(x, x, pid, torch.zeros(3))
    with pytest.raises(ValueError, match="columns"):
        rank_metrics(x, torch.ones(2, 3), pid, pid)
    with pytest.raises(ValueError, match="segment"):
        rank_metrics(x, x, pid, pid, segment=0)


def test_top_matches_shows_the_order_that_is_counted() -> None:
    query, gallery, labels = problem(37, 60, 3, 12, 3, seed=21, integer=True)
    index, score = top_matches(Retrieval(query, gallery, *labels, normalise=False), 60)
    ranks = ranked(query, gallery, *labels, normalise=False)
    qp, gp, qc, gc = labels
    for q in range(37):
        shown = index[q][index[q] >= 0]
        assert not bool(((gp[shown] == qp[q]) & (gc[shown] == qc[q])).any())
        assert bool((score[q][: len(shown)].diff() <= 0).all())
        hits = (gp[shown] == qp[q]).nonzero().flatten()
        assert (int(hits[0]) + 1 if len(hits) else 0) == int(ranks.first_Q[q])


def test_top_matches_pads_a_short_list() -> None:
    camid = torch.tensor([3, 3])
    pids = (torch.tensor([0]), torch.tensor([0, 1]))
    index, score = top_matches(Retrieval(torch.ones(1, 2), torch.ones(2, 2), *pids, camid[:1], camid), 4)
    assert index.tolist() == [[1, -1, -1, -1]]
    assert score[0, 0] == pytest.approx(1.0) and bool((score[0, 1:] == -torch.inf).all())


def test_every_order_of_a_tiny_gallery() -> None:
    # All 24 orders of 2 positives and 2 negatives: the counting form equals the sorted list each time.
    for order in permutations([4.0, 3.0, 2.0, 1.0]):
        gallery = torch.tensor(order)[:, None]
        ranks = ranked(
            torch.ones(1, 1),
            gallery,
            torch.tensor([1]),
            torch.tensor([1, 1, 0, 0]),
            normalise=False,
        )
        places = sorted(5 - int(value) for value in order[:2])
        assert ranks.first_Q.tolist() == [places[0]]
        assert ranks.ap_Q.tolist() == pytest.approx([(1 / places[0] + 2 / places[1]) / 2])
        assert ranks.inp_Q.tolist() == pytest.approx([2 / places[1]])
