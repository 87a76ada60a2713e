"""Saved class centres: read by any number of ranks, and training goes on as if nothing had been."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import all_gather_ragged, rank, world_size
from reid_dist.errors import UserError
from reid_dist.losses.sharded_identity import sharded_identity_loss
from reid_dist.models.classifier_file import load_classifier, save_classifier
from reid_dist.models.row_optimizer import RowOptimizer
from reid_dist.models.sharded_classifier import ShardedClassifier

CLASSES, FEATURES, ROWS = 23, 5, 12
SHARD = "shard-00001-of-00003.safetensors"


def make(seed: int = 0, name: str = "adamw", classes: int = CLASSES) -> ShardedClassifier:
    optimizer = RowOptimizer(name, 0.1)  # type: ignore[arg-type]
    return ShardedClassifier(classes, FEATURES, optimizer, rate=0.5, seed=seed, dtype=torch.float64)


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


def save_and_go_on(folder: Path) -> tuple[int, dict[str, Tensor]]:
    classifier = make()
    train(classifier, 3)
    save_classifier(classifier, folder)
    digest = int(classifier.digest())
    train(classifier, 2)
    return digest, state(classifier)


def load_and_go_on(folder: Path) -> tuple[int, dict[str, Tensor]]:
    classifier = make(seed=0)
    classifier.weight_SD.fill_(7)
    classifier.begin(torch.zeros(2, dtype=torch.int64))  # forgotten by the load
    assert load_classifier(classifier, folder).steps == 3
    digest = int(classifier.digest())
    train(classifier, 2)
    return digest, state(classifier)


@pytest.mark.parametrize("writers", [1, 3])
def test_any_number_of_ranks_goes_on_where_another_was(writers: int, tmp_path: Path, run_ranks: Callable) -> None:
    (digest, expected), *_ = run_ranks(writers, save_and_go_on, tmp_path / "classifier")
    assert len(list((tmp_path / "classifier").glob("*.safetensors"))) == writers
    for readers in (1, 2, 4):
        for found_digest, found in run_ranks(readers, load_and_go_on, tmp_path / "classifier"):
            assert found_digest == digest  # bit by bit
            for name, x in expected.items():
                torch.testing.assert_close(found[name], x, rtol=1e-10, atol=1e-13)


def save_three(folder: Path) -> None:
    classifier = make()
    train(classifier, 1)
    save_classifier(classifier, folder)


def refusal(folder: Path, classifier: ShardedClassifier | None = None) -> tuple[str, bool]:
    classifier = make(seed=1) if classifier is None else classifier
    before = int(classifier.digest())
    try:
        load_classifier(classifier, folder)
    except UserError as error:
        return str(error), int(classifier.digest()) == before
    return "", False


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a cut file": (lambda folder: os.truncate(folder / SHARD, 100), f"{SHARD}: damaged"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: missing; restore it, or remove "),
    "no manifest": (lambda folder: (folder / "classifier.json").unlink(), "there is no saved classifier; remove "),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_refused_on_every_rank_and_nothing_changes(damage: str, tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(3, save_three, tmp_path / "classifier")
    harm, expected = DAMAGE[damage]
    harm(tmp_path / "classifier")
    for found in (run_ranks(1, refusal, tmp_path / "classifier"), run_ranks(2, refusal, tmp_path / "classifier")):
        assert len(set(found)) == 1 and found[0][1]
        assert expected in found[0][0] and "\n" not in found[0][0]


def test_another_problem_s_centres_are_refused(tmp_path: Path) -> None:
    save_three(tmp_path / "classifier")
    for other in (make(name="sgd"), make(classes=24)):
        message, unchanged = refusal(tmp_path / "classifier", other)
        assert "23 identities of 5 features with 2 moments, but data, model and optimizer.name" in message
        assert message.endswith("to start with new class centres") and unchanged


def test_the_files_say_that_they_are_personal_data(tmp_path: Path) -> None:
    save_three(tmp_path / "classifier")
    assert "personal data" in (tmp_path / "classifier" / "classifier.json").read_text()
