"""No bit depends on how the work is shared out: segments of the gallery, blocks of queries, threads, ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reid_dist.benchmarks.kernel_worker import peak_extra_bytes
from reid_dist.evaluation.benchmark import Task, rank_task
from reid_dist.evaluation.ranking import QueryRanks, Retrieval, rank_queries, top_matches
from reid_dist.evaluation.reranking.k_reciprocal import k_reciprocal
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard


def problem(queries: int, gallery: int, features: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    make = torch.Generator().manual_seed(seed)
    query, entry = (torch.randn(size, features, generator=make) for size in (queries, gallery))
    sizes = ((queries, 40), (gallery, 40), (queries, 3), (gallery, 3))  # identities and cameras
    return query, entry, [torch.randint(high, (size,), generator=make) for size, high in sizes]


def ranked(query: Tensor, gallery: Tensor, labels: list[Tensor], segment: int = 2**17) -> QueryRanks:
    return rank_queries(Retrieval(query, gallery, *labels), segment=segment)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double()).float().double()


@pytest.mark.parametrize("segment", [1, 4096, 5000, 8192])
def test_segments_change_no_bit(segment: int) -> None:
    query, gallery, labels = problem(40, 9001, 129, seed=4)
    whole, part = ranked(query, gallery, labels), ranked(query, gallery, labels, segment=segment)
    assert torch.equal(whole.table(), part.table())


def test_a_gallery_in_a_file_is_read_a_segment_at_a_time(tmp_path: Path) -> None:
    query, gallery, labels = problem(40, 9001, 33, seed=5)
    np.save(tmp_path / "gallery.npy", gallery.numpy().astype(np.float16))
    mapped = torch.from_numpy(np.load(tmp_path / "gallery.npy", mmap_mode="c"))
    found = ranked(query, mapped, labels, segment=4096)
    assert torch.equal(found.table(), ranked(query, gallery.half(), labels).table())


@pytest.mark.parametrize("dealt", [[[0, 2], [1]], [[2], [0, 1]], [[], [0, 1, 2]]])
def test_blocks_of_queries_change_no_bit(dealt: list[list[int]]) -> None:
    query, gallery, labels = problem(1201, 300, 65, seed=7)
    want = ranked(query, gallery, labels).table()
    for blocks in dealt:
        found = rank_queries(Retrieval(query, gallery, *labels), blocks=blocks).table()
        rows = [torch.arange(block * 512, min(1201, block * 512 + 512)) for block in blocks]
        assert torch.equal(found, want[torch.cat([torch.zeros(0, dtype=torch.int64), *rows])])


RERANKINGS = {"cosine": lambda task: task, "jaccard": neighbour_jaccard, "k-reciprocal": k_reciprocal}


def table_of_ranks(reranking: str) -> Tensor:
    query, gallery, labels = problem(1201, 300, 65, seed=7)
    retrieval = Retrieval(query, gallery, *labels)
    task = Task("i2i", RERANKINGS[reranking](retrieval), torch.arange(1201), torch.arange(300))
    return rank_task(task).table()


@pytest.mark.parametrize("reranking", RERANKINGS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_blocks_and_agree_to_the_bit(
    run_ranks: Callable[..., list[Any]], ranks: int, reranking: str
) -> None:
    want = table_of_ranks(reranking)
    assert all(torch.equal(found, want) for found in run_ranks(ranks, table_of_ranks, reranking))


def tables_with_threads(threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    tables = [table_of_ranks(reranking) for reranking in RERANKINGS]
    assert torch.get_num_threads() == threads
    return tables


def test_threads_change_no_bit(run_ranks: Callable[..., list[Any]]) -> None:
    # In processes of their own: one that has started OpenMP's threads must not be forked later.
    one, three = (run_ranks(1, tables_with_threads, threads)[0] for threads in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize(
    ("call", "blocks"),
    [
        (rank_queries, 5),
        (lambda task: rank_queries(task, segment=4096), 4),
        (lambda task: top_matches(task, 10), 7),
        (lambda task: rank_queries(neighbour_jaccard(task)), 10),
        (lambda task: rank_queries(k_reciprocal(task)), 18),
    ],
    ids=["cosine", "segments", "top", "jaccard", "k-reciprocal"],
)
def test_memory_is_that_of_a_block(call: Callable[[Retrieval], object], blocks: int) -> None:
    query, gallery, labels = problem(4000, 12_000, 8, seed=15)
    extra = peak_extra_bytes(lambda: call(Retrieval(query, gallery, *labels)), torch.device("cpu"))
    assert extra is not None
    assert extra < blocks * 512 * 12_288 * 4  # of one block; of all cosines 8, of the gallery 23, of all with all 40


def test_similarity_is_the_cosine_in_fp32() -> None:
    query, gallery, labels = problem(600, 20, 700, seed=13)
    found = Retrieval(query, gallery, *labels).similarity()
    assert found.dtype == torch.float32 and found.shape == (600, 20)
    torch.testing.assert_close(found.double(), unit(query) @ unit(gallery).T, rtol=0, atol=2e-7)


def test_equal_images_tie_wherever_they_stand() -> None:
    # An fp32 product may add in an order that depends on the place; in blocks of one shape it must not.
    make = torch.Generator().manual_seed(14)
    query, gallery = torch.randn(700, 129, generator=make), torch.randn(9000, 129, generator=make)
    places = torch.tensor([0, 1, 4095, 4096, 5003, 8190, 8999])
    gallery[places] = gallery[0].clone()
    similarity = Retrieval(query, gallery, torch.zeros(700), torch.zeros(9000)).similarity()
    assert bool((similarity[:, places] == similarity[:, :1]).all())
    query[:] = query[0].clone()
    similarity = Retrieval(query, gallery, torch.zeros(700), torch.zeros(9000)).similarity()
    assert bool((similarity == similarity[:1]).all())
