"""Training steps that do not depend on how they are shared out, and evaluation that sees each row once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reid_dist.data.cache import ImageCache
from reid_dist.data.loader import Sampling, TrainLoader, caption_batches, caption_table, eval_batches
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import Batch, TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.errors import UserError

Build = Callable[..., Path]
TOKENIZER = WordTokenizer(["one", "picture", "caption", *map(str, range(30))], 8, 64)


@pytest.fixture
def samples(build: Build) -> TrainingSamples:
    augment = Augment(pad=2, erase=0.5, jitter=0.1)
    return TrainingSamples([ShardSet(build("one", train=9))], (16, 8), TOKENIZER, augment)


def _join(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _global_steps(samples: TrainingSamples, start: int, stop: int, ranks: int, **settings: Any) -> list[Batch]:
    """The steps of all ranks, joined in canonical order."""
    sampling = Sampling(12, **settings)
    loaders = [TrainLoader(samples, sampling, rank, ranks) for rank in range(ranks)]
    steps = zip(*(loader.steps(start, stop) for loader in loaders), strict=True)
    return [_join([rank[a] for a in range(sampling.accumulation) for rank in step]) for step in steps]


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


@pytest.mark.parametrize("kind", ["epoch", "identity"])
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 1), (1, 3), (2, 3), (12, 1)])
def test_any_share_of_the_work_gives_the_same_global_batches(
    samples: TrainingSamples, kind: str, ranks: int, accumulation: int
) -> None:
    alone = _global_steps(samples, 0, 5, 1, kind=kind)
    shared = _global_steps(samples, 0, 5, ranks, kind=kind, accumulation=accumulation)
    assert _equal(alone, shared)


def test_resume_equals_going_on(samples: TrainingSamples) -> None:
    straight = _global_steps(samples, 0, 7, 1)
    assert _equal(straight[3:], _global_steps(samples, 3, 7, 1))


def test_epoch_sees_each_sample_once(samples: TrainingSamples) -> None:
    loader = TrainLoader(samples, Sampling(9))
    assert (loader.num_samples, loader.steps_per_epoch, loader.num_identities) == (27, 3, 9)
    for first in (0, 3):
        ids = torch.cat([batch["sample_id_B"] for (batch,) in loader.steps(first, first + 3)])
        assert sorted(ids.tolist()) == list(range(27))
    assert [loader.epoch(step) for step in (0, 2, 3)] == [0, 0, 1]
    assert loader.wait_seconds > 0


def test_identity_batches(samples: TrainingSamples) -> None:
    loader = TrainLoader(samples, Sampling(12, "identity", images=4))
    assert loader.steps_per_epoch == 3
    seen = []
    for (batch,) in loader.steps(0, 3):
        people = batch["pid_B"].reshape(3, 4)
        assert (people == people[:, :1]).all()
        seen += people[:, 0].tolist()
        # Three images for four places: the repeated one is augmented anew.
        for images in batch["image_BCHW"].reshape(3, 4, -1):
            assert len(torch.unique(images, dim=0)) == 4
    assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("cache", [False, True])
def test_workers_give_the_same(build: Build, cache: bool) -> None:
    shards, kept = ShardSet(build("one", train=9)), ImageCache() if cache else None
    samples = TrainingSamples([shards], (16, 8), TOKENIZER, Augment(pad=2), kept)
    alone = [_join(step) for step in TrainLoader(samples, Sampling(6, accumulation=2)).steps(1, 9)]
    state = torch.get_rng_state()
    loader = TrainLoader(samples, Sampling(6, accumulation=2), workers=2)
    assert _equal(alone, [_join(step) for step in loader.steps(1, 9)])
    assert torch.equal(torch.get_rng_state(), state)  # the model's random numbers are left alone


def test_random_state_of_the_process_plays_no_part(samples: TrainingSamples) -> None:
    first = _global_steps(samples, 0, 2, 1)
    np.random.seed(5)
    torch.manual_seed(5)
    assert _equal(first, _global_steps(samples, 0, 2, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_one_line(build: Build, workers: int) -> None:
    samples = TrainingSamples([ShardSet(build("one", spoil=7))], (16, 8))
    loader = TrainLoader(samples, Sampling(5), workers=workers)
    with pytest.raises(UserError, match=r"one \(one\), shard one-\d+\.tar, sample s007: the image") as caught:
        list(loader.steps(0, 3))
    assert "\n" not in str(caught.value)


def test_wrong_sizes_are_refused_before_anything_is_read(samples: TrainingSamples) -> None:
    with pytest.raises(UserError, match=r"data.global_batch_size: 12 .* world size 5; nearest that work: 10 or 15"):
        TrainLoader(samples, Sampling(12), 0, 5)
    with pytest.raises(UserError, match="takes 10 identities, but the training set has 9"):
        TrainLoader(samples, Sampling(40, "identity", images=4))


@pytest.mark.parametrize("world_size", range(1, 9))
def test_evaluation_sees_each_row_once(build: Build, world_size: int) -> None:
    shards = ShardSet(build("one"))
    rows = shards.rows("test")[::-1]
    seen = np.zeros(len(rows), int)
    for rank in range(world_size):
        for position_B, batch in eval_batches(shards, rows, (16, 8), 2, rank, world_size):
            seen[position_B] += 1
            assert np.array_equal(batch["sample_id_B"].numpy(), rows[position_B])
            assert batch["pid_B"].tolist() == shards.index["pid"][rows[position_B]].tolist()
            assert batch["image_BCHW"].shape == (len(position_B), 3, 16, 8)
            assert batch["image_BCHW"].is_contiguous() and batch["token_BL"].shape == (len(position_B), 1)
    assert (seen == 1).all()


def test_evaluation_of_nothing(build: Build) -> None:
    shards = ShardSet(build("one"))
    assert list(eval_batches(shards, shards.rows("val"), (16, 8))) == []


def test_captions_for_evaluation(build: Build) -> None:
    shards = ShardSet(build("one", captions=3))
    captions, position = caption_table(shards, shards.rows("test")[:2])
    assert position.tolist() == [0, 0, 0, 1, 1, 1]
    assert captions[4] == "one picture 16 caption 1"
    joined = torch.zeros(6, 8, dtype=torch.int64)
    for rank in range(2):
        for position_B, token_BL in caption_batches(captions, TOKENIZER, 2, rank, 2):
            joined[position_B] += token_BL
    assert torch.equal(joined, TOKENIZER(captions))
