"""Market-1501 from file names."""

from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import market1501
from shards.raw import Counts, count_parts


def test_samples(market: Path) -> None:
    found = [
        (sample.source, sample.pid, sample.camid, sample.split, sample.role) for sample in market1501.samples(market)
    ]
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
    assert count_parts(market1501.samples(market), market1501) == {
        "train": Counts(2, 3, 0),
        "query": Counts(2, 2, 0),
        "gallery": Counts(2, 3, 0),
        "junk": Counts(0, 1, 0),
    }


@pytest.mark.parametrize("name", ["other.jpg", "0002_c0s1_000451_03.jpg", "2_c1s1_000451_03.jpg"])
def test_other_names(market: Path, name: str) -> None:
    (market / "query" / name).write_bytes(b"x")
    with pytest.raises(UserError, match="not a Market-1501 name"):
        list(market1501.samples(market))


def test_junk_outside_the_gallery(market: Path) -> None:
    (market / "bounding_box_train" / "-1_c1s1_000401_03.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="identity -1 belongs into bounding_box_test only"):
        list(market1501.samples(market))


def test_missing_folders(market: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bounding_box_train: missing; --root is the Market-1501 folder"):
        list(market1501.samples(tmp_path))
    for image in (market / "query").glob("*.jpg"):
        image.unlink()
    with pytest.raises(UserError, match="query: holds no images"):
        list(market1501.samples(market))
