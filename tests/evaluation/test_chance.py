"""Exact chance against shuffling and against sums by hand."""

import pytest
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.evaluation.chance import chance_metrics
from reid_dist.evaluation.ranking import METRIC_KEYS, rank_metrics


def brute_chance(labels: tuple[Tensor, ...], cameras: bool, rounds: int) -> dict[str, float]:
    make = torch.Generator().manual_seed(1)
    total = dict.fromkeys(METRIC_KEYS, 0.0)
    for _ in range(rounds):
        query = torch.ones(len(labels[0]), 1)
        gallery = torch.rand(len(labels[1]), 1, generator=make)  # one random order for all queries is enough
        got = rank_metrics(query, gallery, *(labels if cameras else labels[:2]), normalise=False)
        for key in METRIC_KEYS:
            total[key] += got[key] / rounds
    return total


@pytest.mark.parametrize("cameras", [False, True])
def test_chance_equals_shuffling(cameras: bool) -> None:
    make = torch.Generator().manual_seed(0)
    labels = tuple(torch.randint(0, high, (n,), generator=make) for n, high in ((9, 6), (14, 6), (9, 2), (14, 2)))
    exact = chance_metrics(*(labels if cameras else labels[:2]))
    mean = brute_chance(labels, cameras, rounds=4000)
    for key in METRIC_KEYS:
        assert exact[key] == pytest.approx(mean[key], abs=1.0), key
    skipped = rank_metrics(torch.ones(9, 1), torch.ones(14, 1), *(labels if cameras else labels[:2]))["skipped"]
    assert exact["skipped"] == skipped


def test_chance_by_hand() -> None:
    one = chance_metrics(torch.tensor([1]), torch.arange(100))
    assert one["R1"] == pytest.approx(1.0) and one["R10"] == pytest.approx(10.0)
    assert one["mAP"] == pytest.approx(sum(1 / k for k in range(1, 101)))  # percent of H_100 / 100
    assert one["mINP"] == pytest.approx(one["mAP"])
    sure = chance_metrics(torch.tensor([1]), torch.tensor([1, 1, 1]))
    assert all(sure[key] == pytest.approx(100.0) for key in METRIC_KEYS)
    with pytest.raises(UserError, match="none of the 1 queries"):
        chance_metrics(torch.tensor([5]), torch.tensor([1]))
