"""The data of a seed: who is in which set, what a second call does, and what it refuses."""

import json
from pathlib import Path

import pytest

from reid_dist.claims.arms import CAPTIONED, GENERIC, IMAGES, UNSEEN
from reid_dist.claims.worlds import (
    INSTANCE,
    VOCABULARY_FILE,
    WORLD_FILE,
    Sizes,
    _exports,
    build_world,
    parameters,
    read_limits,
)
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import count_words
from reid_dist.errors import UserError

SIZES = Sizes(captioned=6, images=8, test=5, pairs=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims") / "world"
    build_world(folder, "claims", SIZES, 2, (64, 32))
    return folder


def people(shards: ShardSet, split: str) -> int:
    return len({shards.sample(int(row)).pid for row in shards.rows(split) if shards.sample(int(row)).role != "junk"})


def test_sets_have_the_sizes_asked_for(world: Path) -> None:
    captioned, images, unseen = (ShardSet(world / name) for name in (CAPTIONED, IMAGES, UNSEEN))
    assert people(captioned, "train") == SIZES.captioned and len(captioned.rows("train")) == 8 * SIZES.captioned
    assert people(images, "train") == SIZES.images
    assert people(captioned, "test") == people(unseen, "test") == SIZES.test
    assert len(ShardSet(world / GENERIC)) == SIZES.pairs
    assert not (world / "raw").exists()


def test_only_the_images_have_no_captions(world: Path) -> None:
    for name, captioned in ((CAPTIONED, True), (UNSEEN, True), (GENERIC, True), (IMAGES, False)):
        shards = ShardSet(world / name)
        assert all(bool(shards.sample(int(row)).captions) == captioned for row in shards.rows("train"))


def test_nobody_is_in_two_sets_and_cameras_differ() -> None:
    worlds = [spec.world for seed in (0, 1, 2) for name, spec in _exports("claims", SIZES, seed).items()
              if name != GENERIC]  # fmt: skip
    assert len({world.seed for world in worlds}) == len(worlds)
    assert {(world.hardness, world.siblings, world.instance) for world in worlds} == {(0.6, 1, INSTANCE)}
    assert parameters("claims", SIZES, 0)["instance"] == INSTANCE > 0


def test_no_image_of_the_benchmarks_is_trained_on(world: Path) -> None:
    tested = {ShardSet(world / name).sample(int(row)).sha256 for name in (CAPTIONED, IMAGES, UNSEEN)
              for row in ShardSet(world / name).rows("test")}  # fmt: skip
    trained = {ShardSet(world / name).sample(int(row)).sha256 for name in (CAPTIONED, IMAGES, GENERIC)
               for row in ShardSet(world / name).rows("train")}  # fmt: skip
    assert not tested & trained


def test_the_word_list_has_every_word_of_the_captions(world: Path) -> None:
    words = set((world / VOCABULARY_FILE).read_text().split())
    assert set(count_words([ShardSet(world / CAPTIONED)])) <= words


def test_limits_are_there_for_both_tasks(world: Path) -> None:
    limits = read_limits(world)
    assert set(limits) == {
        "chance",
        "raw_histogram",
        "histogram",
        "ridge",
        "oracle",
    }
    assert limits["oracle"]["i2i"]["mAP"] == pytest.approx(100)
    assert limits["chance"]["t2i"]["mAP"] < limits["oracle"]["t2i"]["mAP"]


def test_a_second_call_writes_nothing(world: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    build_world(world, "claims", SIZES, 2, (64, 32))
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before


def test_an_interrupted_one_is_finished(world: Path, tmp_path: Path) -> None:
    """Killed between two sets: the second call ends with the same bytes."""
    folder = tmp_path / "world"
    (folder / "raw").mkdir(parents=True)
    spec = _exports("claims", SIZES, 2)[CAPTIONED]
    from shards.world.export import export

    export(spec, folder / "raw" / CAPTIONED)
    build_world(folder, "claims", SIZES, 2, (64, 32))
    for name in (CAPTIONED, IMAGES, GENERIC, UNSEEN):
        for tar in (world / name).glob("*.tar"):
            assert tar.read_bytes() == (folder / name / tar.name).read_bytes()


@pytest.mark.parametrize(
    ("level", "sizes", "seed", "named"),
    [("hard", SIZES, 2, "hardness"), ("claims", Sizes.of(400), 2, "sizes"), ("claims", SIZES, 3, "seed")],
)
def test_a_folder_of_another_world_is_refused(world: Path, level: str, sizes: Sizes, seed: int, named: str) -> None:
    with pytest.raises(UserError, match=rf"holds another world \(differs: .*{named}.*--runs"):
        build_world(world, level, sizes, seed, (64, 32))


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / WORLD_FILE).write_text('{"parameters"')
    with pytest.raises(UserError, match=r"world.json: cannot be read; remove"):
        build_world(tmp_path, "claims", SIZES, 0, (64, 32))


def test_sizes_keep_their_proportions() -> None:
    assert Sizes.of(400) == Sizes(400, 400, 200, 12_000)
    assert json.loads(json.dumps(Sizes.of(4).__dict__))["test"] >= 2
