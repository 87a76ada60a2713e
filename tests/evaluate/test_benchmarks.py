"""Which sets are meant, which tasks they allow, and what is refused from the index alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.evaluate.benchmarks import choose_tasks, open_sets

PEDES = [("a", -1, "gallery", ["red"]), ("b", -1, "gallery", ["green", "green coat"])]
MARKET = [("a", 0, "query", []), ("a", 1, "gallery", []), ("b", 1, "gallery", [])]


def chosen(folder: Path, wanted: tuple = (), split: str = "test") -> tuple:
    (benchmark,) = choose_tasks({"toy": ShardSet(folder)}, split, wanted)
    return benchmark.tasks


def test_names_folders_and_addresses(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(open_sets(["market1501", "cuhk_pedes"], str(world))) == ["market1501", "cuhk_pedes"]
    assert list(open_sets([str(world / "cuhk_pedes")], "/nowhere")) == ["cuhk_pedes"]
    monkeypatch.chdir(world)
    assert open_sets(["./cuhk_pedes"], "elsewhere")["cuhk_pedes"].location == str(world / "cuhk_pedes")
    monkeypatch.chdir(world / "cuhk_pedes")
    assert list(open_sets(["."], str(world))) == ["."]
    with pytest.raises(UserError, match="--benchmarks '': no such shard set"):
        open_sets([""], str(world))


def test_two_sets_of_one_name_are_told_apart(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    folders = [str(write_set(tmp_path / place / "market", MARKET)) for place in "ab"]
    assert list(open_sets(folders, "/nowhere")) == ["market", folders[1]]


def test_wrong_names_name_what_there_is(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--benchmarks cuhk: no such shard set; sets in .*: cuhk_pedes, market1501$"):
        open_sets(["cuhk"], str(world))
    with pytest.raises(UserError, match="holds no shard sets; name their folder: --data"):
        open_sets(["cuhk"], str(tmp_path))
    for nothing in ("", ".", "./", "x" * 5000):
        with pytest.raises(UserError, match=r"no such shard set.*; sets in .*: cuhk_pedes, market1501$") as caught:
            open_sets([nothing], str(world))
        assert "remove" not in str(caught.value)
    (tmp_path / "begun").mkdir()
    with pytest.raises(UserError, match=r"begun: no such shard set, as .*begun has no manifest\.json"):
        open_sets(["begun"], str(tmp_path))
    for again in ("cuhk_pedes", str(world / "cuhk_pedes")):
        with pytest.raises(UserError, match="stands twice"):
            open_sets(["cuhk_pedes", again], str(world))


def test_tasks_are_those_that_the_set_allows(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    pedes, market = write_set(tmp_path / "p", PEDES), write_set(tmp_path / "m", MARKET)
    assert chosen(pedes) == ("t2i", "i2t") and chosen(market) == ("i2i",)
    both = write_set(tmp_path / "b", [*PEDES, *MARKET])
    assert chosen(both) == ("t2i", "i2t", "i2i") and chosen(both, ("i2i", "t2i")) == ("t2i", "i2i")
    described_distractors = [*MARKET, ("z", 1, "distractor", ["blue"])]
    assert chosen(write_set(tmp_path / "d", described_distractors)) == ("i2i",)
    with pytest.raises(UserError, match=r"^toy: split test has nothing for these tasks \(i2i needs both query and gal"):
        chosen(pedes, ("i2i",))
    with pytest.raises(UserError, match="t2i needs captions"):
        chosen(write_set(tmp_path / "q", [("a", 0, "query", []), ("b", 0, "query", [])]))
    with pytest.raises(UserError, match="no query or gallery images in split val"):
        chosen(market, split="val")


def test_sets_without_anything_to_get_wrong_or_right(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    one = "has a gallery of one identity, so that any answer would be right"
    with pytest.raises(UserError, match=f"^toy: split test: t2i {one}; i2t {one}; choose another split or set$"):
        chosen(write_set(tmp_path / "one", PEDES[:1]))
    with pytest.raises(UserError, match=f"split test: i2i {one}; choose another"):
        chosen(write_set(tmp_path / "identity", MARKET[:2]))
    # Two are asked for, and the gallery of that task alone is of one.
    gallery = write_set(tmp_path / "gallery", [*MARKET[:2], ("b", 0, "query", ["red"]), ("a", 0, "query", ["blue"])])
    with pytest.raises(UserError, match=f"i2i {one}; --tasks t2i i2t scores the rest"):
        chosen(gallery)
    described = write_set(tmp_path / "described", [*PEDES[:1], ("b", -1, "gallery", []), ("c", -1, "gallery", [])])
    with pytest.raises(UserError, match=f"i2t {one}; --tasks t2i scores the rest"):
        chosen(described)
    assert chosen(gallery, ("i2t", "t2i")) == ("t2i", "i2t") and chosen(described, ("t2i",)) == ("t2i",)
    same_camera = [(pid, 0, role, ["red"]) for pid in "ab" for role in ("query", "gallery")]
    folder = write_set(tmp_path / "camera", same_camera)
    with pytest.raises(UserError, match=r"asked for by one camera and seen by another.*; --tasks t2i i2t scores"):
        chosen(folder)
    with pytest.raises(UserError, match="choose another split or set"):
        chosen(folder, ("i2i",))
    assert chosen(folder, ("t2i",)) == ("t2i",)
    unknown = [(pid, -1, role, []) for pid, _, role, _ in same_camera]  # an unknown camera removes nothing
    assert chosen(write_set(tmp_path / "unknown", unknown)) == ("i2i",)
