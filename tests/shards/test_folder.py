"""Anyone's own folders: with and without splits, cameras in names, nothing left out silently."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import folder
from shards.raw import Counts, RawSample, count_parts

Draw = Callable[[Path, int], None]


def _samples(root: Path) -> list[RawSample]:
    return list(folder.samples(root, "standard"))


@pytest.fixture
def plain(tmp_path: Path, draw_at: Draw) -> Path:
    for number, name in enumerate(["anna/2_c3.jpg", "anna/1.png", "ber.t 2/x_c12_f7.JPG", "c_c9/y.jpg"]):
        draw_at(tmp_path / "p_c5" / name, number)
    (tmp_path / "p_c5" / "anna" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "p_c5" / "readme.txt").write_text("mine")
    draw_at(tmp_path / "p_c5" / ".cache" / "z.jpg", 7)
    return tmp_path / "p_c5"


@pytest.fixture
def split(tmp_path: Path, draw_at: Draw) -> Path:
    names = ["train/a/1_c0.jpg", "val/v/1_c1.jpg", "val/v/2_c0.jpg", "val/w/3.jpg", "query/t/1_c1.jpg"]
    for number, name in enumerate([*names, "gallery/t/2_c2.jpg", "gallery/u/1_c1.jpg"]):
        draw_at(tmp_path / name, number)
    return tmp_path


def test_without_splits_all_is_train(plain: Path) -> None:
    assert [(s.source, s.pid, s.camid, s.split, s.role, s.captions) for s in _samples(plain)] == [
        ("anna/1.png", "anna", -1, "train", "train", ()),
        ("anna/2_c3.jpg", "anna", 3, "train", "train", ()),
        ("ber.t 2/x_c12_f7.JPG", "ber.t 2", 12, "train", "train", ()),
        ("c_c9/y.jpg", "c_c9", -1, "train", "train", ()),
    ]
    assert count_parts(_samples(plain), folder) == {"train": Counts(3, 4, 0, 2)}


def test_with_splits(split: Path) -> None:
    assert [(s.source, s.pid, s.camid, s.split, s.role) for s in _samples(split)] == [
        ("train/a/1_c0.jpg", "a", 0, "train", "train"),
        ("val/v/1_c1.jpg", "v", 1, "val", "query"),
        ("val/v/2_c0.jpg", "v", 0, "val", "gallery"),
        ("val/w/3.jpg", "w", -1, "val", "query"),
        ("query/t/1_c1.jpg", "t", 1, "test", "query"),
        ("gallery/t/2_c2.jpg", "t", 2, "test", "gallery"),
        ("gallery/u/1_c1.jpg", "u", 1, "test", "gallery"),
    ]
    assert set(count_parts(_samples(split), folder)) == {"train", "val", "query", "gallery"}


@pytest.mark.parametrize(
    ("name", "camera"),
    [
        ("0002_c1s1_000451_03.jpg", 1),
        ("x_c007.jpg", 7),
        ("a_c1_c2.jpg", 1),
        ("c4_x.jpg", -1),
        ("x_c4b.jpg", -1),
        ("x_C4.jpg", -1),
        ("x_c.jpg", -1),
        ("x_c3.jpg.jpg", 3),
    ],
)
def test_cameras_in_names(tmp_path: Path, name: str, camera: int, draw_at: Draw) -> None:
    draw_at(tmp_path / "a" / name, 1)
    assert [sample.camid for sample in _samples(tmp_path)] == [camera]


def test_a_camera_out_of_range(tmp_path: Path, draw_at: Draw) -> None:
    draw_at(tmp_path / "a" / "x_c2147483647.jpg", 1)
    assert _samples(tmp_path)[0].camid == 2**31 - 1
    draw_at(tmp_path / "a" / "y_c2147483648.jpg", 1)
    with pytest.raises(UserError, match="camera 2147483648 is out of range; rename"):
        _samples(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gallery2/x/1.jpg", "gallery2/ stands beside train/"),
        ("train/a/more/1.jpg", "more: a folder inside the folder of an identity"),
        ("train/a/scan.TIF", r"scan\.TIF: \.TIF is not read; convert it"),
        ("gallery/a/5.jpg", "identity 'a' is in train/ and in a split to test on"),
        ("val/a/5.jpg", "identity 'a' is in train/ and in a split to test on"),
    ],
)
def test_what_does_not_belong_there(split: Path, name: str, message: str, draw_at: Draw) -> None:
    draw_at(split / Path(name).with_suffix(".jpg"), 1)
    if not name.endswith(".jpg"):
        (split / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message) as caught:
        _samples(split)
    assert "\n" not in str(caught.value)


def test_empty_trees_and_halves(tmp_path: Path, split: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no folders; put the images of each identity"):
        _samples(tmp_path / "empty")
    (tmp_path / "empty" / "anna").mkdir()
    with pytest.raises(UserError, match="anna: holds no images"):
        _samples(tmp_path / "empty")
    (tmp_path / "empty" / "anna").rmdir()
    (tmp_path / "empty").rmdir()
    (split / "gallery").rename(split / ".gallery")
    with pytest.raises(UserError, match="query/ and gallery/ belong together"):
        _samples(split)
