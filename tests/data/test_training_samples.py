"""Joining training sets, and making micro-batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.data.cache import ImageCache
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import BatchTask, TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.errors import UserError

Build = Callable[..., Path]
WORDS = ["one", "two", "tiny", "picture", "caption", *map(str, range(30))]


def _task(*ids: int, epoch: int = 0, occurrence: int = 0, seed: int = 0) -> BatchTask:
    return BatchTask(seed, epoch, np.array(ids), np.full(len(ids), occurrence))


def test_identities_are_numbered_over_all_sets(build: Build) -> None:
    two, one = ShardSet(build("two", train=3)), ShardSet(build("one", train=2))
    samples = TrainingSamples([two, one], (16, 8))
    assert samples.identities == ["one:0", "one:1", "two:0", "two:1", "two:2"]
    assert len(samples) == 15
    assert samples.pid_N.tolist() == [2, 2, 2, 3, 3, 3, 4, 4, 4, 0, 0, 0, 1, 1, 1]
    # cameras 0 to 2 of the second set become 3 to 5
    assert samples.camid_N.tolist() == [0, 1, 2] * 3 + [3, 4, 5] * 2


def test_batch(build: Build) -> None:
    samples = TrainingSamples([ShardSet(build("one"))], (16, 8))
    batch = samples.batch(_task(14, 0, 3))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "image_BCHW": ((3, 3, 16, 8), torch.uint8),
        "token_BL": ((3, 1), torch.int64),
        "pid_B": ((3,), torch.int64),
        "camid_B": ((3,), torch.int64),
        "sample_id_B": ((3,), torch.int64),
    }
    assert batch["sample_id_B"].tolist() == [14, 0, 3]
    assert batch["pid_B"].tolist() == [4, 0, 1]
    expected = samples.images[0](3)
    assert np.array_equal(batch["image_BCHW"][2].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("cache", [None, ImageCache()])
def test_random_numbers_depend_on_seed_epoch_and_sample(build: Build, cache: ImageCache | None) -> None:
    tokenizer = WordTokenizer(WORDS, 8, 64)
    samples = TrainingSamples(
        [ShardSet(build("one", captions=5))], (16, 8), tokenizer, Augment(pad=2, jitter=0.2), cache
    )

    def both(task: BatchTask) -> torch.Tensor:
        batch = samples.batch(task)
        return torch.cat([batch["image_BCHW"].flatten(1), batch["token_BL"]], dim=1)

    base = both(_task(*range(15)))
    assert torch.equal(base, both(_task(*range(15))))
    assert torch.equal(base[[7, 2]], both(_task(7, 2)))
    for other in (_task(*range(15), epoch=1), _task(*range(15), seed=1), _task(*range(15), occurrence=1)):
        result = both(other)
        assert not torch.equal(result[:, :384], base[:, :384])
        assert not torch.equal(result[:, 384:], base[:, 384:])


def test_captions_belong_to_their_images(build: Build) -> None:
    tokenizer = WordTokenizer(WORDS, 8, 64)
    samples = TrainingSamples([ShardSet(build("one")), ShardSet(build("two"))], (16, 8), tokenizer)
    seen = set()
    for epoch in range(20):
        tokens = samples.batch(_task(4, 19, epoch=epoch))["token_BL"]
        choices = [tokenizer(samples.captions(sample_id)).tolist() for sample_id in (4, 19)]
        assert all(row in choice for row, choice in zip(tokens.tolist(), choices, strict=True))
        seen.add(choices[0].index(tokens[0].tolist()))
    assert seen == {0, 1}
    assert samples.captions(19)[0] == "two picture 4 caption 0"


def test_missing_captions(build: Build) -> None:
    tokenizer = WordTokenizer(WORDS, 8, 64)
    shards = [ShardSet(build("one")), ShardSet(build("two", captions=0))]
    with pytest.raises(UserError, match=r"two: 15 of 15 training samples have no caption, the first is s000; .*leave"):
        TrainingSamples(shards, (16, 8), tokenizer)
    samples = TrainingSamples(shards, (16, 8), tokenizer, allow_uncaptioned=True)
    assert samples.batch(_task(0, 15))["token_BL"].any(dim=1).tolist() == [True, False]


def test_excluded_identities_are_dropped_before_numbering(build: Build) -> None:
    one, two = ShardSet(build("one", train=3)), ShardSet(build("two", train=2, captions=0))
    everything = TrainingSamples([one, two], (16, 8))
    # one:3 and one:4 are test identities, two:9 is none at all.
    samples = TrainingSamples([one, two], (16, 8), exclude=["one:1", "one:3", "one:4", "two:0", "two:9"])
    assert (everything.excluded, samples.excluded) == (0, 6)
    assert len(samples) == 9
    assert samples.identities == ["one:0", "one:2", "two:1"]
    assert samples.pid_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert samples.set_N.tolist() == [0] * 6 + [1] * 3
    kept = [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert samples.row_N.tolist() == everything.row_N[kept].tolist()
    images = samples.batch(_task(*range(9)))["image_BCHW"]
    assert torch.equal(images, everything.batch(_task(*kept))["image_BCHW"])


def test_exclusion_settles_what_would_be_refused(build: Build) -> None:
    one, two = ShardSet(build("one", train=2)), ShardSet(build("two", train=1, captions=0))
    tokenizer = WordTokenizer(WORDS, 8, 64)
    samples = TrainingSamples([one, two], (16, 8), tokenizer, exclude={"two:0"})
    assert samples.excluded == 3 and samples.identities == ["one:0", "one:1"]


def test_nothing_left_after_exclusion(build: Build) -> None:
    one = ShardSet(build("one", train=2))
    with pytest.raises(UserError, match=r"one: all 6 training samples are of excluded identities; shorten"):
        TrainingSamples([one], (16, 8), exclude=frozenset({"one:0", "one:1"}))


def test_refusals(build: Build) -> None:
    one = ShardSet(build("one"))
    with pytest.raises(UserError, match=r"same identities.*--dataset"):
        TrainingSamples([one, one], (16, 8))
    with pytest.raises(UserError, match="no training samples"):
        TrainingSamples([ShardSet(build("none", train=0))], (16, 8))
    with pytest.raises(UserError, match="no shard set: no training samples"):
        TrainingSamples([], (16, 8))
    with pytest.raises(UserError, match="pad 8 is not smaller"):
        TrainingSamples([one], (16, 8), augment=Augment(pad=8))
