"""Both ways to count, for GPUs and for processors, against a plain loop."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reid_dist.evaluation.counting import SameIdentity, by_passing_through, by_sorting_rows
from reid_dist.evaluation.ranking import Retrieval, rank_queries
from reid_dist.evaluation.reranking.k_reciprocal import k_reciprocal
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard


def counted(similarity_CS: Tensor, count_C: list[int], value_P: Tensor) -> tuple[list[int], list[bool]]:
    rows = [row for row, count in zip(similarity_CS.tolist(), count_C, strict=True) for _ in range(count)]
    ahead = [sum(each >= value for each in row) for row, value in zip(rows, value_P.tolist(), strict=True)]
    return ahead, [value in row for row, value in zip(rows, value_P.tolist(), strict=True)]


@pytest.mark.parametrize("way", [by_passing_through, by_sorting_rows])
@pytest.mark.parametrize(("size", "most", "coarse"), [(1, 3, False), (37, 5, True), (200, 3, False), (90, 150, True)])
def test_counts(way: object, size: int, most: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    similarity_CS, value_P = (torch.randn(shape, generator=generator) for shape in ((9, size), (9 * most,)))
    if coarse:
        similarity_CS, value_P = similarity_CS.round(), value_P.round()
    similarity_CS[:, ::7] = -torch.inf  # as what is removed
    count_C = torch.randint(0, most + 1, (9,), generator=generator)
    value_P = value_P[: int(count_C.sum())]
    assert callable(way)
    ahead_P, tied_P = way(similarity_CS, count_C, value_P)
    assert (ahead_P.tolist(), tied_P.tolist()) == counted(similarity_CS, count_C.tolist(), value_P)


@pytest.mark.parametrize("way", [by_passing_through, by_sorting_rows])
def test_queries_without_positives(way: object) -> None:
    assert callable(way)
    ahead_P, tied_P = way(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(0))
    assert ahead_P.shape == tied_P.shape == (0,)


def test_pairs_of_one_identity() -> None:
    same = SameIdentity(torch.tensor([3, 1, 3, 2, 3]), torch.tensor([0, 0, 1, 0, -1]))
    query_E, entry_E, kept_E = same.pairs(torch.tensor([3, 9, 1, 3]), torch.tensor([1, 0, 0, -1]))
    found = list(zip(query_E.tolist(), entry_E.tolist(), kept_E.tolist(), strict=True))
    assert found == [
        *((0, 0, True), (0, 2, False), (0, 4, True)),  # camera 1 is the query's
        (2, 1, False),
        *((3, 0, True), (3, 2, True), (3, 4, True)),  # an unknown camera removes nothing
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_ranks_as_the_processor_does() -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-2, 3, (size, 16), generator=generator).float() for size in (700, 5000))
    labels = [torch.randint(0, high, (size,), generator=generator) for high in (300, 4) for size in (700, 5000)]
    here, there = (Retrieval(query.to(device), gallery.to(device), *labels) for device in ("cpu", "cuda"))
    whole = rank_queries(replace(here, normalise=False)).table()
    assert torch.equal(whole, rank_queries(replace(there, normalise=False), segment=4096).table())
    for reranking in (neighbour_jaccard, k_reciprocal):
        found = reranking(there).similarity()
        assert torch.equal(found, reranking(there).similarity())
        torch.testing.assert_close(found.cpu(), reranking(here).similarity(), rtol=0, atol=1e-5)
