"""Processes that measure together."""

from typing import Any

import pytest
import torch

from reid_dist.benchmarks.ranks import measure_on_ranks
from reid_dist.distributed import all_gather, rank, world_size
from reid_dist.errors import UserError


def _measure(case: int) -> dict[str, Any]:
    if rank() == case:
        raise RuntimeError("no memory")
    return {"ranks": all_gather(torch.tensor([rank()])).tolist(), "threads": torch.get_num_threads()}


def test_ranks_join_a_group_and_the_first_one_reports() -> None:
    assert measure_on_ranks("toy", 3, 1, _measure, 5) == {"ranks": [0, 1, 2], "threads": 1}
    assert world_size() == 1  # here nothing was joined


def test_a_rank_that_fails_is_reported() -> None:
    with pytest.raises(UserError, match=r"^toy benchmark on 1 ranks failed: RuntimeError: no memory$"):
        measure_on_ranks("toy", 1, 1, _measure, 0)
