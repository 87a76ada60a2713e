"""Training steps that do not depend on how they are shared out, and evaluation that sees each row once."""

import os
import signal
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
from reid_dist.data.training_samples import Batch, BatchTask, TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.errors import UserError

Build = Callable[..., Path]
TOKENIZER = WordTokenizer(["one", "two", "three", "picture", "caption", *map(str, range(30))], 8, 64)


@pytest.fixture
def samples(build: Build) -> TrainingSamples:
    augment = Augment(pad=2, erase=0.5, jitter=0.1)
    return TrainingSamples([ShardSet(build("one", train=9))], (16, 8), TOKENIZER, augment)


def _join(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _global_steps(samples: TrainingSamples, start: int, stop: int, ranks: int, **settings: Any) -> list[Batch]:
    """The steps of all ranks, joined in canonical order."""
    sampling = Sampling(settings.pop("batch", 12), **settings)
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
    loader = TrainLoader(samples, Sampling(12))
    assert (loader.num_samples, loader.num_identities, loader.local_batch_size) == (27, 9, 12)
    ids = torch.cat([batch["sample_id_B"] for (batch,) in loader.steps(0, 9)])
    for epoch in range(4):
        assert sorted(ids[27 * epoch : 27 * (epoch + 1)].tolist()) == list(range(27))
    assert loader.passes(9) == [4.0] and loader.passes(0) == [0.0]
    assert ids[:12].tolist() == loader.step_rows(0).tolist()
    assert loader.wait_seconds > 0


def test_the_two_epochs_of_a_batch_are_augmented_each_in_its_own_way(samples: TrainingSamples) -> None:
    (batch,) = next(TrainLoader(samples, Sampling(12)).steps(2, 3))  # 3 samples of epoch 0 and 9 of epoch 1
    for epoch, rows in ((0, slice(0, 3)), (1, slice(3, 12))):
        ids = batch["sample_id_B"][rows].numpy()
        task = BatchTask(0, np.full(len(ids), epoch), ids, np.zeros(len(ids), int))
        assert torch.equal(batch["image_BCHW"][rows], samples.batch(task)["image_BCHW"])


def test_identity_batches(samples: TrainingSamples) -> None:
    loader = TrainLoader(samples, Sampling(12, "identity", images=4))
    seen = []
    for (batch,) in loader.steps(0, 6):
        people = batch["pid_B"].reshape(3, 4)
        assert (people == people[:, :1]).all()
        seen += people[:, 0].tolist()
        # Three images for four places: the repeated one is augmented anew.
        for images in batch["image_BCHW"].reshape(3, 4, -1):
            assert len(torch.unique(images, dim=0)) == 4
        for cameras in batch["camid_B"].reshape(3, 4):
            assert len(set(cameras.tolist())) == 3
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9))


@pytest.fixture
def three(build: Build) -> TrainingSamples:
    sets = [ShardSet(build(name, train=train)) for name, train in (("one", 5), ("two", 9), ("three", 4))]
    return TrainingSamples(sets, (16, 8), TOKENIZER, Augment(pad=2))


@pytest.mark.parametrize("kind", ["epoch", "identity"])
def test_weights_give_each_set_its_share(three: TrainingSamples, kind: str) -> None:
    sampling = Sampling(20, kind, images=2, weights=(2, 2, 1))
    loader = TrainLoader(three, sampling)
    for (batch,) in loader.steps(0, 8):
        of_set = three.set_N[batch["sample_id_B"].numpy()]
        assert np.bincount(of_set).tolist() == [8, 8, 4]
    assert loader.passes(3) == ([1.6, 24 / 27, 1.0] if kind == "epoch" else [2.4, 12 / 9, 1.5])
    alone = _global_steps(three, 0, 3, 1, kind=kind, weights=(2, 2, 1), images=2, batch=24)
    for start, ranks, accumulation in ((0, 2, 3), (1, 3, 1), (2, 1, 3)):
        shared = _global_steps(
            three, start, 3, ranks, kind=kind, weights=(2, 2, 1), images=2, accumulation=accumulation, batch=24
        )
        assert _equal(alone[start:], shared)


def test_weights_that_do_not_fit(three: TrainingSamples, build: Build) -> None:
    for weights in ((1, 2), (1, 2, 0), (1, 2, float("inf")), (1, -1, 1)):
        with pytest.raises(
            UserError, match=r"data\.weights: \[.*\] for 3 shard sets; give one number above 0 for each"
        ):
            TrainLoader(three, Sampling(12, weights=weights))
    empty = TrainingSamples([three.shards[0], ShardSet(build("empty", train=0))], (16, 8))
    with pytest.raises(UserError, match=r"data\.weights: .*empty has no training samples; leave the set out"):
        TrainLoader(empty, Sampling(12, weights=(1, 1)))


@pytest.fixture
def told(build: Build) -> TrainingSamples:
    counts = {"one": 2, "two": 1, "three": 3, "bare": 0}
    sets = [ShardSet(build(name, train=9, captions=count)) for name, count in counts.items()]
    return TrainingSamples(sets, (16, 8), TOKENIZER, Augment(pad=2), allow_uncaptioned=True)


def test_captions_of_several_sets_are_shared_out_together(told: TrainingSamples) -> None:
    # Each captioned set has a third of a row in the mean.
    loaders = [TrainLoader(told, Sampling(8, weights=(1, 1, 1, 3)), rank, 4) for rank in range(4)]
    for step in zip(*(loader.steps(0, 8) for loader in loaders), strict=True):
        assert [len(batch["token_BL"]) for (batch,) in step] == [1] * 4
    with pytest.raises(UserError, match=r"0\.5 of the 1 rows of a rank's micro-batch"):
        TrainLoader(told, Sampling(8, weights=(1, 1, 1, 3)), 0, 8)


@pytest.mark.parametrize("settings", [{"weights": (1, 1, 2, 4)}, {"mixing": "alternating"}])
def test_workers_hand_over_batches_with_some_or_no_captions(told: TrainingSamples, settings: dict[str, Any]) -> None:
    sampling = Sampling(8, accumulation=2, **settings)
    alone, other = ([_join(step) for step in TrainLoader(told, sampling, workers=n).steps(2, 11)] for n in (0, 2))
    assert _equal(alone, other) and all(x["captioned_B"].dtype == torch.bool for x in other)
    assert {len(batch["token_BL"]) for batch in other} == ({4} if "weights" in settings else {0, 8})


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # the machine has fewer cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same(build: Build, cache: bool, workers: int) -> None:
    shards, kept = ShardSet(build("one", train=9)), ImageCache() if cache else None
    samples = TrainingSamples([shards], (16, 8), TOKENIZER, Augment(pad=2), kept, mask_probability=0.3)
    alone = [_join(step) for step in TrainLoader(samples, Sampling(6, accumulation=2)).steps(1, 9)]
    state = torch.get_rng_state()
    loader = TrainLoader(samples, Sampling(6, accumulation=2), workers=workers)
    assert _equal(alone, [_join(step) for step in loader.steps(1, 9)])
    assert torch.equal(torch.get_rng_state(), state)  # the model's random numbers are left alone


def test_batches_of_workers_may_be_kept(samples: TrainingSamples) -> None:
    # Far more than there are places in the shared memory: the rest travels.
    loader = TrainLoader(samples, Sampling(6), workers=2)
    kept = [step[0] for step in loader.steps(0, 40)]
    assert _equal(kept, [step[0] for step in TrainLoader(samples, Sampling(6)).steps(0, 40)])
    assert kept[0]["image_BCHW"].shape == (6, 3, 16, 8)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # without a GPU torch only says so
def test_page_locked_batches_are_the_same(samples: TrainingSamples) -> None:
    loader = TrainLoader(samples, Sampling(6), workers=1, pin_memory=True)
    assert _equal(
        [step[0] for step in loader.steps(0, 5)], [step[0] for step in TrainLoader(samples, Sampling(6)).steps(0, 5)]
    )


def test_a_loader_that_is_left_early_can_go_on(samples: TrainingSamples) -> None:
    loader = TrainLoader(samples, Sampling(6), workers=2)
    steps = loader.steps(0, 100)
    next(steps)
    steps.close()
    alone = [_join(step) for step in TrainLoader(samples, Sampling(6)).steps(1, 4)]
    assert _equal(alone, [_join(step) for step in loader.steps(1, 4)])


def test_a_killed_worker_is_one_clear_line(samples: TrainingSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(samples, "batch", killed)
    with pytest.raises(
        UserError, match=r"data\.workers: a process that reads training samples ended \(.*out of memory"
    ) as e:
        list(TrainLoader(samples, Sampling(6), workers=1).steps(0, 3))
    assert "\n" not in str(e.value)


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


@pytest.mark.parametrize("kind", ["epoch", "identity"])
def test_bad_samples_are_replaced_everywhere_alike(build: Build, kind: str) -> None:
    whole = TrainingSamples([ShardSet(build("one", train=9))], (16, 8), TOKENIZER, Augment(pad=2))
    samples = TrainingSamples([ShardSet(build("two", train=9, spoil=7))], (16, 8), TOKENIZER, Augment(pad=2))
    sampling = Sampling(12, kind, images=2)
    loaders = [TrainLoader(samples, sampling, max_bad_fraction=0.3, workers=workers) for workers in (0, 2)]
    steps = [[_join(step) for step in loader.steps(0, 9)] for loader in loaders]
    assert _equal(*steps)
    for ranks in (2, 3):
        shared = [TrainLoader(samples, sampling, rank, ranks, max_bad_fraction=0.3) for rank in range(ranks)]
        parts = [[_join(step) for step in loader.steps(0, 9)] for loader in shared]
        assert _equal(steps[0], [_join(list(step)) for step in zip(*parts, strict=True)])
        assert sum(loader.bad_samples.count for loader in shared) == loaders[0].bad_samples.count
    for loader in loaders:
        assert loader.bad_samples.seen == 9 * 12
        assert all(
            "two), shard two-" in line and "sample s007: the image" in line for line in loader.bad_samples.messages
        )
    planned = [TrainLoader(whole, sampling).step_rows(step) for step in range(9)]
    assert loaders[0].bad_samples.count == sum(int((rows == 7).sum()) for rows in planned) > 1
    for rows, batch in zip(planned, steps[0], strict=True):
        used = batch["sample_id_B"].numpy()
        assert (used != 7).all() and (used[rows != 7] == rows[rows != 7]).all()
        if kind == "identity":
            assert (whole.pid_N[used] == whole.pid_N[rows]).all()
            assert all(len(set(pair)) == 2 for pair in used.reshape(-1, 2).tolist())
        assert torch.equal(batch["pid_B"], torch.from_numpy(samples.pid_N[used]))


def test_an_identity_without_a_good_image_is_replaced_by_the_next_one(build: Build) -> None:
    folder = build("one", train=9)
    shards = ShardSet(folder)
    for row in (6, 7, 8):
        entry = shards.index[row]
        with (folder / shards.manifest.shards[entry["shard"]].name).open("r+b") as file:
            file.seek(int(entry["image_offset"]))
            file.write(b"\0" * 64)
    loader = TrainLoader(TrainingSamples([shards], (16, 8)), Sampling(6, "identity", images=2), max_bad_fraction=0.5)
    for (batch,) in loader.steps(0, 9):
        people = batch["pid_B"].reshape(3, 2)
        assert (people[:, 0] == people[:, 1]).all() and (people != 2).all()
        assert all(len(set(pair)) == 2 for pair in batch["sample_id_B"].reshape(3, 2).tolist())
    assert loader.bad_samples.count == 2 * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(build: Build, workers: int) -> None:
    samples = TrainingSamples([ShardSet(build("one", train=1, spoil=1))], (16, 8))
    loader = TrainLoader(samples, Sampling(6), workers=workers, max_bad_fraction=0.1)
    with pytest.raises(
        UserError,
        match=r"16 of 48 samples read are bad, more than data\.max_bad_fraction 0\.1 allows: .*s001: the image",
    ):
        list(loader.steps(0, 100))
    assert loader.bad_samples.count == 16


def test_a_shard_that_vanishes_is_told_by_name(build: Build) -> None:
    folder = build("one", train=9)
    loader = TrainLoader(TrainingSamples([ShardSet(folder)], (16, 8)), Sampling(9))
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(UserError, match=r"one-\d+\.tar"):
        list(loader.steps(0, 3))


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
