"""Re-ranking against the formula written out with sets, in both directions; ties, chunks, small galleries, ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import Task, rank_task
from reid_dist.evaluation.nearest import nearest
from reid_dist.evaluation.ranking import Retrieval, rank_queries, summarise, top_matches
from reid_dist.evaluation.reranking.neighbour_jaccard import NeighbourJaccardRetrieval, neighbour_jaccard


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=1).float().double()


def first(scores: list[float], count: int) -> set[int]:
    """Columns of the greatest scores; of equal ones the first."""
    return set(sorted(range(len(scores)), key=lambda column: (-scores[column], column))[:count])


def brute_force(query_QD: Tensor, gallery_GD: Tensor, count: int, weight: float) -> Tensor:
    """Methods.md 3.7, entry by entry with Python's sets."""
    query_QD, gallery_GD = unit(query_QD), unit(gallery_GD)
    cross = (query_QD @ gallery_GD.T).float().tolist()
    own = (gallery_GD @ gallery_GD.T).float().tolist()
    near_gallery = [first(row, count) for row in own]
    out = torch.empty(len(cross), len(own), dtype=torch.float64)
    for q, row in enumerate(cross):
        near = first(row, count)
        for g, other in enumerate(near_gallery):
            out[q, g] = row[g] + weight * len(near & other) / len(near | other)
    return out


def make(queries: int = 23, gallery: int = 17, width: int = 5, seed: int = 0, coarse: bool = False) -> Retrieval:
    """Random features of captions and images; coarse: many that are exactly alike, with cosines that fp32 holds."""
    generator = torch.Generator().manual_seed(seed)
    width = 4 if coarse else width

    def features(rows: int) -> Tensor:
        x = torch.randn(rows, width, generator=generator)
        return x.sign() if coarse else x

    def pids(rows: int) -> Tensor:
        return torch.randint(0, 6, (rows,), generator=generator)

    return Retrieval(features(queries), features(gallery), pids(queries), pids(gallery))


def swapped(retrieval: Retrieval) -> Retrieval:
    return Retrieval(retrieval.gallery_GD, retrieval.query_QD, retrieval.gallery_pid_G, retrieval.query_pid_Q)


def test_the_nearest_come_in_order_and_of_equal_ones_the_first() -> None:
    generator = torch.Generator().manual_seed(3)
    for count in (1, 4, 30):
        similarity = torch.randint(0, 12, (50, 30), generator=generator).float()
        similarity[::2] += torch.rand(25, 30, generator=generator)
        want = similarity.sort(dim=1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(nearest(similarity, count), want)


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("count", [1, 2, 5, 17])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_the_similarity_is_the_formula_in_both_directions(direction: str, count: int, coarse: bool) -> None:
    retrieval = make(coarse=coarse, seed=count)
    retrieval = retrieval if direction == "t2i" else swapped(retrieval)
    found = neighbour_jaccard(retrieval, count, 0.05).similarity()
    expected = brute_force(retrieval.query_QD, retrieval.gallery_GD, count, 0.05)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-7)
    plain = retrieval.similarity()
    assert (found - plain).max() > 0.004 and (found >= plain).all()


def test_the_metrics_are_those_of_the_formula_s_matrix() -> None:
    retrieval = make(40, 30)
    found = rank_queries(neighbour_jaccard(retrieval, 5, 0.3))
    similarity_QG = brute_force(retrieval.query_QD, retrieval.gallery_GD, 5, 0.3).float()
    for q in range(40):
        order = similarity_QG[q].argsort(descending=True).tolist()
        right = [i + 1 for i, g in enumerate(order) if retrieval.gallery_pid_G[g] == retrieval.query_pid_Q[q]]
        assert int(found.first_Q[q]) == (right[0] if right else 0)
        expected = sum((i + 1) / place for i, place in enumerate(right)) / max(1, len(right))
        assert float(found.ap_Q[q]) == pytest.approx(expected, abs=1e-12)
    assert summarise(found) != summarise(rank_queries(retrieval))


def test_weight_zero_changes_no_bit() -> None:
    retrieval = make()
    assert rank_queries(neighbour_jaccard(retrieval, 5, 0.0)).table().equal(rank_queries(retrieval).table())


def test_blocks_and_segments_change_no_bit() -> None:
    retrieval = neighbour_jaccard(make(1030, 19, coarse=True))
    whole = rank_queries(retrieval).table()
    assert rank_queries(retrieval, segment=1).table().equal(whole)
    parts = [rank_queries(retrieval, blocks=[block]).table() for block in range(3)]
    assert torch.cat(parts).equal(whole)


def test_a_gallery_smaller_than_the_neighbourhood_takes_all_of_it() -> None:
    retrieval = make(gallery=3)
    reranked = neighbour_jaccard(retrieval, 5, 0.05)
    assert reranked.neighbours == 3
    plain = retrieval.similarity()
    torch.testing.assert_close(reranked.similarity(), plain + 0.05)


def test_one_image_alone_is_its_own_neighbour() -> None:
    retrieval = Retrieval(torch.randn(2, 4), torch.randn(1, 4), torch.tensor([0, 1]), torch.tensor([0]))
    assert rank_queries(neighbour_jaccard(retrieval)).first_Q.tolist() == [1, 0]


def test_what_is_shown_is_what_is_scored() -> None:
    retrieval = make(12, 9)
    reranked = neighbour_jaccard(retrieval, 3, 0.2)
    _, score_QK = top_matches(reranked, 9)
    expected = brute_force(retrieval.query_QD, retrieval.gallery_GD, 3, 0.2).sort(dim=1, descending=True).values
    torch.testing.assert_close(score_QK.double(), expected, rtol=0, atol=3e-7)


def test_neighbours_are_sought_among_what_is_scored_when_features_are_not_normalised() -> None:
    retrieval = make(8, 6)
    found = neighbour_jaccard(replace(retrieval, normalise=False), 2, 0.05).similarity()
    own = retrieval.gallery_GD.double() @ retrieval.gallery_GD.double().T
    cross = retrieval.query_QD.double() @ retrieval.gallery_GD.double().T
    for q in range(8):
        for g in range(6):
            a, b = first(cross[q].tolist(), 2), first(own[g].tolist(), 2)
            assert float(found[q, g]) == pytest.approx(float(cross[q, g]) + 0.05 * len(a & b) / len(a | b), abs=1e-6)


def test_cameras_are_obeyed_by_the_ranking_alone() -> None:
    retrieval = make(23, 17)
    cameras = torch.arange(23) % 3, torch.arange(17) % 3
    sides = (retrieval.query_QD, retrieval.gallery_GD, retrieval.query_pid_Q, retrieval.gallery_pid_G)
    with_cameras = neighbour_jaccard(Retrieval(*sides, *cameras))
    assert torch.equal(with_cameras.similarity(), neighbour_jaccard(retrieval).similarity())
    assert int(rank_queries(with_cameras).positives_Q.sum()) < int(
        rank_queries(neighbour_jaccard(retrieval)).positives_Q.sum()
    )


def test_what_is_refused() -> None:
    retrieval = make()
    with pytest.raises(ValueError, match="neighbours must be >= 1"):
        neighbour_jaccard(retrieval, 0)
    retrieval.gallery_GD[3, 1] = torch.nan
    with pytest.raises(UserError, match="gallery feature row 3"):
        neighbour_jaccard(retrieval)


def ranks_of(parameters: tuple[int, float]) -> Tensor:
    retrieval = neighbour_jaccard(make(21, 11), *parameters)
    return rank_task(Task("t2i", retrieval, torch.arange(21), torch.arange(11))).table()


def test_two_ranks_find_what_one_finds(run_ranks: Callable[..., list[Any]]) -> None:
    parameters = (5, 0.05)
    expected = rank_queries(neighbour_jaccard(make(21, 11), *parameters)).table()
    assert all(table.equal(expected) for table in run_ranks(2, ranks_of, parameters))


def test_the_type_stays_through_a_selection() -> None:
    part = neighbour_jaccard(make()).only(torch.tensor([3, 1]))
    assert isinstance(part, NeighbourJaccardRetrieval) and torch.equal(
        part.similarity(), neighbour_jaccard(make()).similarity()[[3, 1]]
    )
