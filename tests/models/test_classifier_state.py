"""Class centres taken from a checkpoint: any number of ranks goes on with them as if nothing had been."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import all_gather_ragged, rank, world_size
from reid_dist.losses.sharded_identity import sharded_identity_loss
from reid_dist.models.row_optimizer import RowOptimizer
from reid_dist.models.sharded_classifier import ShardedClassifier
from tests.gathered_pieces import Gathered, Whole, gather

CLASSES, FEATURES, ROWS = 23, 5, 12


def make() -> ShardedClassifier:
    return ShardedClassifier(CLASSES, FEATURES, RowOptimizer("adamw", 0.1), rate=0.5, dtype=torch.float64)


def train(classifier: ShardedClassifier, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(classifier.steps)
        feature = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64).chunk(world_size())[rank()]
        label = torch.randint(CLASSES, (ROWS,), generator=generator).chunk(world_size())[rank()]
        weight_SD, class_S = classifier.centres(label)
        sharded_identity_loss(feature, label, weight_SD, class_S).backward()
        classifier.step()


def state(classifier: ShardedClassifier) -> dict[str, Tensor]:
    return {name: torch.cat(all_gather_ragged(x)) for name, x in classifier.rows().items()}


def save_and_go_on() -> tuple[int, Whole, dict[str, Tensor]]:
    classifier = make()
    train(classifier, 3)
    saved, digest = gather(classifier.pieces()), int(classifier.digest())
    train(classifier, 2)
    return digest, saved, state(classifier)


def restore_and_go_on(whole: Whole) -> tuple[int, dict[str, Tensor]]:
    classifier = make()
    classifier.weight_SD.fill_(7)
    classifier.begin(torch.zeros(2, dtype=torch.int64))  # forgotten
    classifier.restore(Gathered(whole), 3)
    digest = int(classifier.digest())
    train(classifier, 2)
    return digest, state(classifier)


@pytest.mark.parametrize("writers", [1, 3])
def test_any_number_of_ranks_goes_on_where_another_was(writers: int, run_ranks: Callable) -> None:
    digest, whole, expected = run_ranks(writers, save_and_go_on)[0]
    for readers in (1, 2, 4):
        for found_digest, found in run_ranks(readers, restore_and_go_on, whole):
            assert found_digest == digest  # bit by bit
            for name, x in expected.items():
                torch.testing.assert_close(found[name], x, rtol=1e-10, atol=1e-13)
