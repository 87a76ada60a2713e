"""Items: images, or pairs of image and caption."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.cache import ImageCache
from reid_dist.data.exclude import Exclusions
from reid_dist.data.loader import Sampling, TrainLoader
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_items import TrainingItems
from reid_dist.data.training_samples import BatchTask, TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.errors import UserError

Build = Callable[..., Path]
TOKENIZER = WordTokenizer(["one", "two", "picture", "caption", *map(str, range(99))], 8, 128)


def _uneven(folder: Path, captions: dict[int, int]) -> ShardSet:
    """A set whose index names fewer captions of some rows, as if they had no more."""
    shards = ShardSet(folder)
    index = shards.index.copy()
    for row, count in captions.items():
        index["captions"][row] = count
    shards.index = index
    return shards


def test_an_image_is_an_item_for_each_of_its_captions(build: Build) -> None:
    shards = [_uneven(build("one", train=2, captions=3), {1: 1, 4: 2}), ShardSet(build("two", train=1, captions=0))]
    items = TrainingItems(shards, "captions")
    rows, numbers = [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5], [0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]
    assert items.row_N.tolist() == [*rows, 0, 1, 2] and items.caption_N.tolist() == [*numbers, -1, -1, -1]
    assert items.counts == [15, 3] and len(items) == 18 and items.set_N.tolist() == [0] * 15 + [1] * 3
    assert items.pid_N.tolist() == [0] * 7 + [1] * 8 + [2] * 3
    assert items.camid_N.tolist() == [row % 3 for row in rows] + [3, 4, 5]
    assert items.captioned_S.tolist() == [True, False]
    images = TrainingItems(shards)
    assert images.counts == [6, 3] and (images.caption_N == -1).all() and images.identities == items.identities


def test_exclusions_count_images(build: Build) -> None:
    items = TrainingItems([ShardSet(build("one", train=3))], "captions", Exclusions(frozenset({"one:1"})))
    assert items.excluded == 3 and items.row_N.tolist() == np.repeat([0, 1, 2, 6, 7, 8], 2).tolist()


@pytest.mark.parametrize("cache", [None, ImageCache()])
def test_an_item_has_its_own_caption_in_every_epoch(build: Build, cache: ImageCache | None) -> None:
    shards = [ShardSet(build("one", train=3, captions=3))]
    samples = TrainingSamples(shards, (16, 8), TOKENIZER, Augment(pad=2), cache, items="captions")
    for epoch in (0, 1, 7):
        task = BatchTask(0, np.full(27, epoch), np.arange(27), np.zeros(27, int))
        batch = samples.batch(task)
        sentences = [f"one picture {row} caption {number}" for row in range(9) for number in range(3)]
        assert batch["token_BL"].tolist() == TOKENIZER(sentences).tolist()
        # Items of one image are augmented each in its own way.
        assert len({image.numpy().tobytes() for image in batch["image_BCHW"][:3]}) > 1
    assert samples.captions(4) == ["one picture 1 caption 1"]


def test_each_pair_once_in_an_epoch(build: Build) -> None:
    samples = TrainingSamples([ShardSet(build("one", train=5, captions=2))], (16, 8), TOKENIZER, items="captions")
    loader = TrainLoader(samples, Sampling(12))
    assert loader.num_samples == 30 and loader.passes(5) == [2.0]
    seen = [
        (sample, tuple(tokens))
        for (batch,) in loader.steps(0, 5)
        for sample, tokens in zip(batch["sample_id_B"].tolist(), batch["token_BL"].tolist(), strict=True)
    ]
    assert len(set(seen[:30])) == len(set(seen[30:])) == len(set(seen)) == 30


def test_an_identity_batch_may_hold_two_captions_of_an_image(build: Build) -> None:
    shards = [ShardSet(build("one", train=9, captions=2))]
    samples = TrainingSamples(shards, (16, 8), TOKENIZER, items="captions")
    repeated = 0
    for (batch,) in TrainLoader(samples, Sampling(24, "identity", images=4)).steps(0, 6):
        for rows, people in zip(batch["sample_id_B"].reshape(6, 4).tolist(), batch["pid_B"].reshape(6, 4), strict=True):
            assert len(set(rows)) == 4 and len(set(people.tolist())) == 1  # four of the identity's six pairs
            repeated += len(set(samples.row_N[rows].tolist())) < 4
    assert repeated == 36  # of three images


def test_without_captions_items_are_counted_alike(build: Build) -> None:
    """An image-only stage sees the images of the stage with captions that it is compared with."""
    shards = [ShardSet(build("one", captions=3))]
    loaders = [
        TrainLoader(TrainingSamples(shards, (16, 8), tokenizer, Augment(), items="captions"), Sampling(9))
        for tokenizer in (TOKENIZER, None)
    ]
    for (with_text,), (without,) in zip(*(loader.steps(0, 6) for loader in loaders), strict=True):
        assert with_text["image_BCHW"].equal(without["image_BCHW"]) and not without["token_BL"].any()


def test_an_index_that_names_more_captions_than_there_are(build: Build) -> None:
    samples = TrainingSamples([_uneven(build("one", train=1), {2: 3})], (16, 8), TOKENIZER, items="captions")
    with pytest.raises(
        UserError, match=r"one\), shard .*, sample s002: it has fewer captions than the index says; index"
    ):
        samples.batch(BatchTask(0, np.zeros(1, int), np.array([6]), np.zeros(1, int)))
