"""Joining training sets, and making micro-batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.data import training_samples
from reid_dist.data.cache import ImageCache
from reid_dist.data.exclude import Exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.sampler import SPARES
from reid_dist.data.tokenizer import NO_LABEL, WordTokenizer
from reid_dist.data.training_samples import BatchTask, TrainingSamples
from reid_dist.data.transforms import Augment, sample_rng
from reid_dist.errors import UserError

Build = Callable[..., Path]
WORDS = ["one", "two", "tiny", "picture", "caption", *map(str, range(30))]
TOKENIZER = WordTokenizer(WORDS, 8, 64)


def _task(*ids: int, epoch: int = 0, occurrence: int = 0, seed: int = 0) -> BatchTask:
    return BatchTask(seed, np.full(len(ids), epoch), np.array(ids), np.full(len(ids), occurrence))


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
    samples = TrainingSamples(
        [ShardSet(build("one", captions=5))], (16, 8), TOKENIZER, Augment(pad=2, jitter=0.2), cache
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
    samples = TrainingSamples([ShardSet(build("one")), ShardSet(build("two"))], (16, 8), TOKENIZER)
    seen = set()
    for epoch in range(20):
        tokens = samples.batch(_task(4, 19, epoch=epoch))["token_BL"]
        choices = [TOKENIZER(samples.captions(sample_id)).tolist() for sample_id in (4, 19)]
        assert all(row in choice for row, choice in zip(tokens.tolist(), choices, strict=True))
        seen.add(choices[0].index(tokens[0].tolist()))
    assert seen == {0, 1}
    assert samples.captions(19)[0] == "two picture 4 caption 0"


def test_missing_captions(build: Build) -> None:
    shards = [ShardSet(build("one")), ShardSet(build("two", captions=0))]
    with pytest.raises(UserError, match=r"two: 15 of 15 training samples have no caption, the first is s000; .*leave"):
        TrainingSamples(shards, (16, 8), TOKENIZER)
    assert TrainingSamples(shards, (16, 8), TOKENIZER, allow_uncaptioned=True).partly_captioned
    assert not TrainingSamples(shards, (16, 8), allow_uncaptioned=True).partly_captioned
    assert not TrainingSamples(shards[:1], (16, 8), TOKENIZER, allow_uncaptioned=True).partly_captioned


def test_only_captioned_rows_have_tokens(build: Build) -> None:
    shards = [ShardSet(build("one")), ShardSet(build("two", captions=0)), ShardSet(build("three", captions=3))]
    arguments = {"tokenizer": TOKENIZER, "allow_uncaptioned": True, "mask_probability": 0.5}
    samples = TrainingSamples(shards, (16, 8), **arguments)
    order = [20, 3, 31, 16, 44, 0, 29]
    batch = samples.batch(_task(*order))
    assert batch["captioned_B"].tolist() == [False, True, True, False, True, True, False]
    assert batch["captioned_B"].dtype == torch.bool and batch["image_BCHW"].shape[0] == batch["pid_B"].shape[0] == 7
    text = [name for name in batch if "_BL" in name]
    assert sorted(text) == ["masked_label_BL", "masked_token_BL", "token_BL"]
    for set_number, ids in ((0, [3, 0]), (2, [31, 44])):
        first = 30 if set_number else 0
        alone = TrainingSamples([shards[set_number]], (16, 8), **arguments)
        assert "captioned_B" not in alone.batch(_task(0))
        choices = [TOKENIZER(alone.captions(each - first)).tolist() for each in ids]
        rows = batch["token_BL"][[0, 3] if set_number == 0 else [1, 2]].tolist()
        assert all(row in choice for row, choice in zip(rows, choices, strict=True))
    for each, tokens in enumerate(batch["token_BL"]):  # each row is what it would be alone
        sample = [each for each in order if samples.captioned_S[samples.set_N[each]]][each]
        assert torch.equal(samples.batch(_task(sample))["token_BL"][0], tokens)
    none = samples.batch(_task(20, 16))
    assert none["captioned_B"].tolist() == [False, False]
    assert all(none[name].shape == (0, 8) and none[name].dtype == torch.int64 for name in text)
    assert samples.batch(_task(3, 31))["captioned_B"].tolist() == [True, True]


def test_a_set_is_captioned_as_a_whole_or_not_at_all(tmp_path: Path, build: Build) -> None:
    one = ShardSet(build("one"))
    entries = one.index.copy()
    entries["captions"][[1, 2]] = 0
    one.index = entries
    with pytest.raises(
        UserError, match=r"one: 2 of 15 .* have no caption, the first is s001; a set has captions for all"
    ):
        TrainingSamples([one, ShardSet(build("two"))], (16, 8), TOKENIZER, allow_uncaptioned=True)
    bare = [ShardSet(build("bare", captions=0)), ShardSet(build("naked", captions=0))]
    with pytest.raises(
        UserError, match=r"bare, .*naked: no captions, but this stage's loss has text_weight; add a capt"
    ):
        TrainingSamples(bare, (16, 8), TOKENIZER, allow_uncaptioned=True)


def test_excluded_identities_are_dropped_before_numbering(build: Build) -> None:
    one, two = ShardSet(build("one", train=3)), ShardSet(build("two", train=2, captions=0))
    everything = TrainingSamples([one, two], (16, 8))
    # one:3 and one:4 are test identities, two:9 is none at all.
    samples = TrainingSamples(
        [one, two], (16, 8), exclude=Exclusions(frozenset({"one:1", "one:3", "one:4", "two:0", "two:9"}))
    )
    assert (everything.excluded, samples.excluded) == (0, 6)
    assert len(samples) == 9
    assert samples.identities == ["one:0", "one:2", "two:1"]
    assert samples.pid_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert samples.set_N.tolist() == [0] * 6 + [1] * 3
    assert samples.counts == [6, 3]
    kept = [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert samples.row_N.tolist() == everything.row_N[kept].tolist()
    images = samples.batch(_task(*range(9)))["image_BCHW"]
    assert torch.equal(images, everything.batch(_task(*kept))["image_BCHW"])


def test_exclusion_settles_what_would_be_refused(build: Build) -> None:
    one, two = ShardSet(build("one", train=2)), ShardSet(build("two", train=1, captions=0))
    samples = TrainingSamples([one, two], (16, 8), TOKENIZER, exclude=Exclusions(frozenset({"two:0"})))
    assert samples.excluded == 3 and samples.identities == ["one:0", "one:1"]


def test_excluded_images(build: Build) -> None:
    one = ShardSet(build("one", train=2))
    images = frozenset(one.sample(row).sha256 for row in (1, 3, 4, 5, 7))
    samples = TrainingSamples([one], (16, 8), exclude=Exclusions(images=images))
    assert samples.excluded == 4 and samples.row_N.tolist() == [0, 2]
    assert samples.identities == ["one:0"]


def test_nothing_left_after_exclusion(build: Build) -> None:
    one = ShardSet(build("one", train=2))
    with pytest.raises(UserError, match=r"one: all 6 training samples are excluded; shorten"):
        TrainingSamples([one], (16, 8), exclude=Exclusions(frozenset({"one:0", "one:1"})))


def test_rows_of_different_epochs(build: Build) -> None:
    samples = TrainingSamples([ShardSet(build("one", captions=5))], (16, 8), TOKENIZER, Augment(pad=2, jitter=0.2))
    ids, epochs = np.arange(15), np.arange(15) % 3
    mixed = samples.batch(BatchTask(0, epochs, ids, np.zeros(15, int)))
    for epoch in range(3):
        whole = samples.batch(_task(*range(15), epoch=epoch))
        for name in ("image_BCHW", "token_BL"):
            assert torch.equal(mixed[name][epochs == epoch], whole[name][epochs == epoch])


def test_images_are_written_into_the_memory_that_is_given(build: Build) -> None:
    shards = ShardSet(build("one"))
    for augment in (None, Augment(flip=1.0), Augment(pad=3, erase=1.0)):
        for cache in (None, ImageCache()):
            samples = TrainingSamples([shards], (16, 8), augment=augment, cache=cache)
            memory = np.full((5, 16, 8, 3), 7, np.uint8)
            batch = samples.batch(_task(3, 0, 3, 9), memory[:4])
            assert np.shares_memory(batch["image_BCHW"].numpy(), memory) and (memory[4] == 7).all()
            assert torch.equal(batch["image_BCHW"], samples.batch(_task(3, 0, 3, 9))["image_BCHW"])
            expected = samples.images[0](3)[:, ::-1] if augment == Augment(flip=1.0) else samples.images[0](3)
            assert np.array_equal(memory[0], expected) == (augment is None or augment.pad == 0)


def test_no_random_numbers_where_nothing_is_random(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("random numbers cost as much as a good part of decoding")

    monkeypatch.setattr(training_samples, "sample_rng", refuse)
    for augment in (None, Augment(flip=0.0)):
        samples = TrainingSamples([ShardSet(build(f"one{augment is None}", captions=1))], (16, 8), TOKENIZER, augment)
        assert samples.batch(_task(0, 1))["token_BL"].any()


def test_every_use_has_random_numbers_of_its_own(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []

    def record(*key: int) -> np.random.Generator:
        used.append(key)
        return sample_rng(*key)

    monkeypatch.setattr(training_samples, "sample_rng", record)
    shards = [ShardSet(build("one", spoil=7))]
    samples = TrainingSamples(shards, (16, 8), TOKENIZER, Augment(), mask_probability=0.5)
    rows = np.array([3, 3, 4, 7, 7])
    task = BatchTask(1, np.array([0, 0, 2, 0, 0]), rows, np.array([0, 1, 0, 0, 1]), np.full((5, 1), 3))
    samples.batch(task, bad=[])
    assert len(used) == len(set(used)) == 5 * 3  # augmentation, caption and masked words
    assert all(0 <= word < 2**64 for key in used for word in key)


def test_masked_words(build: Build) -> None:
    shards = [ShardSet(build("one", captions=3))]
    samples = TrainingSamples(shards, (16, 8), TOKENIZER, mask_probability=0.5)
    plain = TrainingSamples(shards, (16, 8), TOKENIZER)
    batch, again = samples.batch(_task(*range(15))), samples.batch(_task(*range(15)))
    assert torch.equal(batch["token_BL"], plain.batch(_task(*range(15)))["token_BL"])
    token, masked, label = batch["token_BL"], batch["masked_token_BL"], batch["masked_label_BL"]
    assert masked.dtype == label.dtype == torch.int64 and torch.equal(label, again["masked_label_BL"])
    asked = label != NO_LABEL
    assert torch.equal(label[asked], token[asked]) and torch.equal(masked[~asked], token[~asked])
    assert asked.any(dim=1).all()
    other = samples.batch(_task(*range(15), epoch=1, occurrence=1))
    assert not torch.equal(other["masked_label_BL"], label)
    assert "masked_label_BL" not in plain.batch(_task(0))


def test_the_form_of_masking_is_handed_on(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = []

    def record(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        forms.append(arguments[3:])
        return np.zeros(8, int), np.zeros(8, int)

    monkeypatch.setattr(training_samples, "mask_words", record)
    for settings in ({}, {"mask_form": "tokens"}):
        TrainingSamples(
            [ShardSet(build(f"s{len(forms)}"))], (16, 8), TOKENIZER, mask_probability=0.3, **settings
        ).batch(_task(0))
    assert forms == [(0.3, "words"), (0.3, "tokens")]


def _spared(*ids: int, spares: list[int]) -> BatchTask:
    return BatchTask(0, np.zeros(len(ids), int), np.array(ids), np.zeros(len(ids), int), np.array([spares] * len(ids)))


def test_a_spare_takes_the_place_of_a_bad_sample(build: Build) -> None:
    samples = TrainingSamples([ShardSet(build("one", spoil=7))], (16, 8), TOKENIZER, Augment(pad=2, jitter=0.2))
    bad: list[str] = []
    batch = samples.batch(_spared(6, 7, 8, spares=[7, 3, 8]), bad=bad)
    assert batch["sample_id_B"].tolist() == [6, 3, 8] and batch["pid_B"].tolist() == [2, 1, 2]
    assert len(bad) == 1 and "sample s007: the image does not decode" in bad[0]
    tokens = TOKENIZER(samples.captions(3)).tolist()
    assert batch["token_BL"][1].tolist() in tokens
    # The others are what they would have been, and a spare never looks like the sample's own row.
    same = samples.batch(_task(6, 8, 3))["image_BCHW"]
    assert torch.equal(batch["image_BCHW"][[0, 2]], same[:2])
    assert not torch.equal(batch["image_BCHW"][1], same[2])
    with pytest.raises(UserError, match="s007"):
        samples.batch(_spared(6, 7, spares=[3]))


def test_a_spare_is_captioned_where_the_bad_sample_was(build: Build) -> None:
    # Otherwise one rank would have fewer captions than the others.
    shards = [ShardSet(build("one", spoil=7)), ShardSet(build("two", captions=0))]
    samples = TrainingSamples(shards, (16, 8), TOKENIZER, allow_uncaptioned=True, mask_probability=0.9)
    batch = samples.batch(_spared(16, 7, spares=[17, 6]), bad=[])
    assert batch["sample_id_B"].tolist() == [16, 6] and batch["captioned_B"].tolist() == [False, True]
    assert len(batch["token_BL"]) == 1 and batch["token_BL"].any()
    assert TrainingSamples(shards, (16, 8)).batch(_spared(16, 7, spares=[17, 6]), bad=[])["sample_id_B"][1] == 17


def test_nothing_that_could_stand_for_a_bad_sample(build: Build) -> None:
    samples = TrainingSamples([ShardSet(build("one", spoil=7))], (16, 8))
    with pytest.raises(
        UserError, match=f"s007: the image .*; {SPARES} samples that could stand for it are bad as well"
    ):
        samples.batch(_spared(7, spares=[7] * SPARES), bad=[])


def test_a_damaged_record_is_a_bad_sample(build: Build) -> None:
    folder = build("one")
    shards = ShardSet(folder)
    entry = shards.index[4]
    with (folder / shards.manifest.shards[entry["shard"]].name).open("r+b") as file:
        file.seek(int(entry["json_offset"]) + 5)
        file.write(b"?")
    bad: list[str] = []
    batch = TrainingSamples([shards], (16, 8), TOKENIZER).batch(_spared(3, 4, spares=[9]), bad=bad)
    assert batch["sample_id_B"].tolist() == [3, 9] and len(bad) == 1 and "s004" in bad[0]


def test_refusals(build: Build) -> None:
    one = ShardSet(build("one"))
    with pytest.raises(UserError, match=r"same identities, 5 of them, the first is one:0; leave .*--dataset"):
        TrainingSamples([one, one], (16, 8))
    with pytest.raises(UserError, match="no training samples"):
        TrainingSamples([ShardSet(build("none", train=0))], (16, 8))
    with pytest.raises(UserError, match="no shard set: no training samples"):
        TrainingSamples([], (16, 8))
    with pytest.raises(UserError, match="masking of words: this stage has no captions"):
        TrainingSamples([one], (16, 8), mask_probability=0.15)
    with pytest.raises(UserError, match="pad 8 is not smaller"):
        TrainingSamples([one], (16, 8), augment=Augment(pad=8))
