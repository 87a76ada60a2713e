"""Re-rankings as the command line names them, with parameters that tables print."""

import pytest
import torch

from reid_dist.errors import UserError
from reid_dist.evaluation.ranking import Retrieval, rank_queries
from reid_dist.evaluation.reranking.choice import KReciprocal, NeighbourJaccard, describe_reranking, parse_reranking
from reid_dist.evaluation.reranking.k_reciprocal import k_reciprocal
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard


def test_names_parameters_and_labels() -> None:
    assert parse_reranking("jaccard") == NeighbourJaccard(5, 0.05)
    assert parse_reranking("k_reciprocal:k1=50,k2=15") == KReciprocal(50, 15, 0.3)
    found = parse_reranking("jaccard:weight=1,neighbours=3")
    assert found.label == "jaccard(neighbours=3, weight=1.0)"
    assert describe_reranking(found) == {"name": "jaccard", "neighbours": 3, "weight": 1.0}
    assert describe_reranking(None) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosine", "no re-ranking 'cosine'; known: jaccard, k_reciprocal"),
        ("jaccard:k1=3", "jaccard takes each of neighbours, weight once, not 'k1'"),
        ("k_reciprocal:k1=3,k1=4", "k_reciprocal takes each of k1, k2, weight once"),
        ("k_reciprocal:k1=3.5", "k1 is a number like 20, not '3.5'"),
        ("k_reciprocal:weight", "weight is a number like 0.3, not ''"),
        ("jaccard:neighbours=0", "neighbours must be >= 1"),
        ("jaccard:weight=nan", "weight a number >= 0"),
        ("jaccard:weight=1e39", "weight a number >= 0 and <= 1000"),
        ("k_reciprocal:weight=1.5", "weight from 0 to 1"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^--rerank ") as caught:
        parse_reranking(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_they_are_the_functions_with_their_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    pid_Q, pid_G = torch.arange(9) % 4, torch.arange(12) % 4
    features = torch.randn(9, 5, generator=generator), torch.randn(12, 5, generator=generator)
    plain = Retrieval(*features, pid_Q, pid_G)
    expected = rank_queries(neighbour_jaccard(plain, 3, 0.7)), rank_queries(k_reciprocal(plain, 4, 2, 0.6))
    for way, ranks in zip((NeighbourJaccard(3, 0.7), KReciprocal(4, 2, 0.6)), expected, strict=True):
        assert rank_queries(way.apply(plain)).table().equal(ranks.table())
        assert not rank_queries(plain).table().equal(ranks.table())
