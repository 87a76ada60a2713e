"""k-reciprocal re-ranking against the dense procedure, written here row by row in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reid_dist.evaluation.ranking import Retrieval, rank_queries, summarise, top_matches
from reid_dist.evaluation.reranking import k_reciprocal as room
from reid_dist.evaluation.reranking.k_reciprocal import k_reciprocal


def make(queries: int, gallery: int, features: int = 8, spread: float = 0.6, seed: int = 0) -> Retrieval:
    """People whose images lie around a centre of their own."""
    generator = torch.Generator().manual_seed(seed)
    people = max(2, (queries + gallery) // 6)
    centre = torch.randn(people, features, generator=generator)
    pid = torch.arange(queries + gallery) % people
    feature = centre[pid] + spread * torch.randn(queries + gallery, features, generator=generator)
    camera = torch.randint(0, 3, (queries + gallery,), generator=generator)
    return Retrieval(feature[:queries], feature[queries:], pid[:queries], pid[queries:], camera[:queries],
        camera[queries:])  # fmt: skip


def dense(retrieval: Retrieval, k1: int, k2: int, weight: float, normalise: bool = True) -> Tensor:
    """Final distances of queries to gallery entries, as evaluation.md 6.1 says, step by step."""
    feature = torch.cat([retrieval.query_QD, retrieval.gallery_GD]).double()
    if normalise:
        feature = torch.nn.functional.normalize(feature, dim=1)
    size, queries = len(feature), len(retrieval.query_QD)
    plain = torch.cdist(feature, feature, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance = (plain / plain.max(0).values).T
    order = distance.argsort(dim=1, stable=True).tolist()

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in order[i][: k + 1] if i in order[j][: k + 1]]

    half = round(k1 / 2)
    table = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        mine = reciprocal(i, k1)
        widened = set(mine)
        for candidate in mine:
            theirs = reciprocal(candidate, half)
            if len(set(theirs) & set(mine)) > 2 / 3 * len(theirs):
                widened |= set(theirs)
        members = sorted(widened)
        table[i, members] = (-distance[i, members]).exp()
        table[i] /= table[i].sum()
    if k2 > 1:
        table = torch.stack([table[order[i][:k2]].mean(0) for i in range(size)])
    final = torch.zeros(queries, size - queries, dtype=torch.float64)
    for q in range(queries):
        for g in range(size - queries):
            common = torch.minimum(table[q], table[queries + g]).sum()
            jaccard = 1 - common / (2 - common)
            final[q, g] = (1 - weight) * jaccard + weight * distance[q, queries + g]
    return final


@pytest.mark.parametrize(
    ("queries", "gallery", "k1", "k2", "weight"),
    [
        (7, 40, 6, 3, 0.3),
        (12, 61, 20, 6, 0.3),
        (5, 33, 5, 1, 0.1),
        (3, 50, 7, 9, 0.5),
        (9, 20, 50, 15, 0.0),
        (4, 9, 1, 2, 1.0),
    ],
)
def test_equals_the_dense_procedure(queries: int, gallery: int, k1: int, k2: int, weight: float) -> None:
    retrieval = make(queries, gallery)
    found = k_reciprocal(retrieval, k1, k2, weight).similarity()
    torch.testing.assert_close(-found.double(), dense(retrieval, k1, k2, weight), rtol=1e-5, atol=1e-5)


def test_more_than_one_block_and_parts_of_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    retrieval = make(530, 120)
    want = dense(retrieval, 6, 3, 0.3)
    monkeypatch.setattr(room, "_ROWS", 37)
    monkeypatch.setattr(room, "_PAIRS", 101)
    found = k_reciprocal(retrieval, 6, 3).similarity()
    torch.testing.assert_close(-found.double(), want, rtol=1e-5, atol=1e-5)
    first, rest = (k_reciprocal(retrieval, 6, 3), rank_queries(k_reciprocal(retrieval, 6, 3), segment=50))
    assert torch.equal(rank_queries(first).table(), rest.table())


@pytest.mark.parametrize("normalise", [True, False])
def test_features_of_any_length(normalise: bool) -> None:
    retrieval = make(6, 40, features=3, spread=1.0)
    found = k_reciprocal(replace(retrieval, normalise=normalise), 5, 2).similarity()
    torch.testing.assert_close(-found.double(), dense(retrieval, 5, 2, 0.3, normalise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_equals_it_for_other_people(seed: int) -> None:
    retrieval = make(10, 50, features=4, spread=0.9, seed=seed)
    found = k_reciprocal(retrieval, 10, 4).similarity()
    torch.testing.assert_close(-found.double(), dense(retrieval, 10, 4, 0.3), rtol=1e-5, atol=1e-5)


def test_ranking_takes_queries_in_parts_and_obeys_cameras() -> None:
    retrieval = make(20, 60)
    reranked = k_reciprocal(retrieval, 8, 3)
    odd = rank_queries(reranked.only(slice(1, None, 2)))
    assert torch.equal(odd.ap_Q, rank_queries(reranked).ap_Q[1::2])
    index_QK, _ = top_matches(reranked, 5)
    for query, found in enumerate(index_QK.tolist()):
        for entry in (entry for entry in found if entry >= 0):
            same = retrieval.gallery_pid_G[entry] == retrieval.query_pid_Q[query]
            assert not (same and retrieval.gallery_camid_G[entry] == retrieval.query_camid_Q[query])


def test_it_helps_where_people_form_groups() -> None:
    retrieval = make(40, 200, features=16, spread=0.8)
    plain, reranked = (summarise(rank_queries(each))["mAP"] for each in (retrieval, k_reciprocal(retrieval, 10, 4)))
    assert reranked > plain + 5


def test_weight_1_is_the_plain_ranking() -> None:
    retrieval = make(15, 70)
    plain, reranked = rank_queries(retrieval), rank_queries(k_reciprocal(retrieval, 10, 4, 1.0))
    assert torch.equal(plain.ap_Q, reranked.ap_Q)


@pytest.mark.parametrize("gallery", [1, 2])
def test_a_gallery_of_next_to_nothing(gallery: int) -> None:
    retrieval = Retrieval(torch.randn(2, 4), torch.randn(gallery, 4), torch.tensor([0, 1]), torch.arange(gallery))
    found = k_reciprocal(retrieval, 20, 6).similarity()
    assert found.shape == (2, gallery) and found.isfinite().all()


@pytest.mark.parametrize("numbers", [(0, 6, 0.3), (20, 0, 0.3), (20, 6, -0.1), (20, 6, 1.1), (20, 6, math.nan)])
def test_numbers_that_cannot_be_are_refused(numbers: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="k1 and k2 must be >= 1"):
        k_reciprocal(make(3, 9), *numbers)
