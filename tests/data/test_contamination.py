"""What training sets share with evaluation sets, from indexes and cards alone."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data.contamination import find_contamination
from reid_dist.data.exclude import NOTHING, Exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import Sample
from shards.index import ShardWriter

Make = Callable[..., ShardSet]
MARKET: dict[str, Any] = {"converter": "market1501"}
CUHK: dict[str, Any] = {"converter": "cuhk_pedes", "contains": ["market1501", "cuhk03_np"]}
ICFG: dict[str, Any] = {"converter": "icfg_pedes", "contains": ["msmt17"]}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A set of images by their content; images are compared by hash, so any bytes will do."""

    def write(
        name: str, train: str = "", test: str = "", junk: str = "", card: dict[str, Any] | None = None
    ) -> ShardSet:
        folder = tmp_path / name
        folder.mkdir()
        writer = ShardWriter(folder, name)
        parts = [("train", "train", train), ("val", "query", test[:1]), ("test", "gallery", test[1:])]
        number = 0
        for split, role, images in [*parts, ("test", "junk", junk)]:
            for image in images:
                facts = {"dataset": name, "pid": f"{name}:{image}", "camid": 0, "split": split, "role": role}
                digest = hashlib.sha256(image.encode()).hexdigest()
                size = {"source": "", "width": 1, "height": 1, "sha256": digest}
                writer.add(f"s{number}", Sample.model_validate({**facts, **size}), image.encode())
                number += 1
        writer.finish(card or {})
        return ShardSet(folder)

    return write


def test_shared_images_are_counted_after_exclusions(make: Make) -> None:
    one, two = make("one", train="abcdd", test="xy"), make("two", train="efx", test="dgba", junk="c")
    (line,) = find_contamination([one], [one, two, two])
    # d is there twice, c is junk there: not in any ranking.
    assert line.startswith(f"{one.path}: 3 images to train on are also in the val or test split of {two.path}; ")
    assert "`python -m shards.verify --overlap DIR... --out exclude.txt`" in line and "\n" not in line
    found = find_contamination([one, two, one], [one, two])
    assert [each.split(":")[0] for each in found] == [str(one.path), str(two.path)]
    people, image = frozenset({"one:a", "one:d"}), frozenset({hashlib.sha256(b"b").hexdigest()})
    assert ": 1 images" in find_contamination([one], [two], Exclusions(people))[0]
    assert find_contamination([one], [two], Exclusions(people, image)) == []
    assert find_contamination([one], [], NOTHING) == find_contamination([], [one], NOTHING) == []


def test_a_copy_of_a_set_is_the_set_itself(make: Make, tmp_path: Path) -> None:
    one = make("one", train="abc", test="ad", card=CUHK)
    copy = shutil.copytree(one.path, tmp_path / "copy")
    assert find_contamination([one], [ShardSet(copy)]) == []


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [
        (CUHK, MARKET, "market1501"),
        (MARKET, CUHK, "market1501"),
        (ICFG, {**ICFG, "converter": "rstp_reid"}, "msmt17"),
        (CUHK, {"converter": "cuhk03_np"}, "cuhk03_np"),
        (CUHK, {"converter": "msmt17"}, None),
        (CUHK, CUHK, None),
        ({**CUHK, "world": {"version": 1}}, MARKET, None),
        (MARKET, {**CUHK, "world": {}}, None),
        ({}, {}, None),
        ({"contains": "market1501", "converter": 7}, MARKET, None),
    ],
)
def test_sets_cut_from_one_another(make: Make, train: dict[str, Any], test: dict[str, Any], shared: str | None) -> None:
    one, two = make("one", train="ab", card=train), make("two", test="cd", card=test)
    found = find_contamination([one], [two])
    assert len(found) == (shared is not None)
    for line in found:
        assert line.startswith(f"{one.path}: shows people of {shared}, and so does {two.path}, ")
    # A list speaks for the sets that it was made of, and only when it leaves something of them out.
    both = frozenset({one.manifest.index_sha256, two.manifest.index_sha256})
    people = frozenset({"one:a"})
    assert find_contamination([one], [two], Exclusions(frozenset({"three:a"}), compared=both)) == found
    assert find_contamination([one], [two], Exclusions(people)) == found
    for each in both:
        assert find_contamination([one], [two], Exclusions(people, compared=frozenset({each}))) == found
    assert find_contamination([one], [two], Exclusions(people, compared=both)) == []
