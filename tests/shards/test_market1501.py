"""Market-1501 from file names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import market1501
from shards.raw import Counts, RawSample, count_parts


def _samples(root: Path, variant: str = "standard") -> list[RawSample]:
    return list(market1501.samples(root, variant))


def test_samples(market: Path) -> None:
    found = [(sample.source, sample.pid, sample.camid, sample.split, sample.role) for sample in _samples(market)]
    assert found == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", "0002", 0, "train", "train"),
        ("bounding_box_train/0002_c3s1_000551_01.jpg", "0002", 2, "train", "train"),
        ("bounding_box_train/0007_c6s3_077419_03.jpg", "0007", 5, "train", "train"),
        ("query/0001_c1s1_001051_00.jpg", "0001", 0, "test", "query"),
        ("query/1500_c2s1_000301_00.jpg", "1500", 1, "test", "query"),
        ("bounding_box_test/-1_c1s1_000401_03.jpg", "-1", 0, "test", "junk"),
        ("bounding_box_test/0000_c4s6_018816_04.jpg", "0000", 3, "test", "distractor"),
        ("bounding_box_test/0001_c2s1_000301_00.jpg", "0001", 1, "test", "gallery"),
        ("bounding_box_test/1500_c5s1_000301_00.jpg.jpg", "1500", 4, "test", "gallery"),
    ]


def test_counts_follow_the_published_table(market: Path) -> None:
    assert count_parts(_samples(market), market1501) == {
        "train": Counts(2, 3, 0, 3),
        "query": Counts(2, 2, 0, 2),
        "gallery": Counts(2, 3, 0, 3),
        "junk": Counts(0, 1, 0, 1),
    }


def test_further_distractors_have_any_name(market: Path, draw_at: Callable[[Path, int], None]) -> None:
    with pytest.raises(UserError, match=r"images: missing; .*use the variant standard"):
        _samples(market, "distractors_500k")
    for number, name in enumerate(["0000_c3s1_000001_00.jpg", "0002_c1s1_000451_03.jpg", "31415.jpg", "-1_x.jpg"]):
        draw_at(market / "images" / name, number)
    (market / "images" / "Thumbs.db").write_bytes(b"x")
    assert len(_samples(market)) == 9
    found = _samples(market, "distractors_500k")[9:]
    assert {(sample.pid, sample.split, sample.role) for sample in found} == {("0000", "test", "distractor")}
    cameras = {sample.source: sample.camid for sample in found}
    assert cameras == {
        "images/0000_c3s1_000001_00.jpg": 2,
        "images/0002_c1s1_000451_03.jpg": 0,
        "images/31415.jpg": -1,
        "images/-1_x.jpg": -1,
    }
    counts = count_parts(_samples(market, "distractors_500k"), market1501)
    assert counts["gallery"] == Counts(2, 3, 0, 3) and counts["distractors_500k"] == Counts(0, 4, 0, 2)


def test_files_that_are_no_images(market: Path) -> None:
    for name in ["Thumbs.db", ".DS_Store", "._0002_c1s1_000451_03.jpg", "readme.txt"]:
        (market / "query" / name).write_bytes(b"x")
    (market / "query" / "0009_c1s1_000001_00.jpg").mkdir()
    assert len(_samples(market)) == 9


@pytest.mark.parametrize("name", ["other.jpg", "0002_c0s1_000451_03.jpg", "2_c1s1_000451_03.jpg", "x0002_c1s1_1_1.jpg"])
def test_other_names(market: Path, name: str) -> None:
    (market / "query" / name).write_bytes(b"x")
    with pytest.raises(UserError, match="not a Market-1501 name"):
        _samples(market)


def test_duke_in_markets_folders(market: Path) -> None:
    (market / "query" / "0001_c2_f0046182.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"0001_c2_f0046182\.jpg: a name of DukeMTMC-reID, which was withdrawn"):
        _samples(market)


def test_junk_outside_the_gallery(market: Path) -> None:
    (market / "bounding_box_train" / "-1_c1s1_000401_03.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="identity -1 belongs into bounding_box_test only"):
        _samples(market)


def test_missing_folders(market: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bounding_box_train: missing; --root is the Market-1501 folder"):
        _samples(tmp_path)
    for image in (market / "query").glob("*.jpg"):
        image.unlink()
    with pytest.raises(UserError, match="query: holds no images"):
        _samples(market)
