"""MSMT17 from its lists: two versions, colliding test numbers, val that may be trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import msmt17
from shards.raw import Counts, RawSample, count_parts

LISTS = {
    "list_train.txt": (
        "train",
        ["0000/0000_013_04_0303morning_0020_2.jpg 0", "0001/0001_064_14_0303noon_0978_1.jpg 1"],
    ),
    "list_val.txt": ("train", ["0000/0000_014_04_0303morning_0020_2_ex.jpg 0"]),
    "list_query.txt": ("test", ["0000/0000_000_01_0302noon_0001_0.jpg 0", "0007/0007_000_15_0302noon_0001_0.jpg 7"]),
    "list_gallery.txt": ("test", ["0000/0000_001_02_0302afternoon_0001_0.jpg 0"]),
}
V1, V2 = {"train": "train", "test": "test"}, {"train": "mask_train_v2", "test": "mask_test_v2"}


@pytest.fixture
def make(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Callable[[dict[str, str]], Path]:
    def tree(folders: dict[str, str]) -> Path:
        # Above the root, so that a camera read from the whole path would be 7.
        root = tmp_path / "a_b_07_c"
        for name, (split, lines) in LISTS.items():
            for line in lines:
                path = root / folders[split] / line.split()[0]
                draw_at(path, sum(line.encode()))
                (path.parent / "Thumbs.db").write_bytes(b"x")
            (root / name).write_text("\n".join(lines) + "\n\n")
        return root

    return tree


def _samples(root: Path, variant: str = "train") -> list[RawSample]:
    return list(msmt17.samples(root, variant))


@pytest.mark.parametrize("folders", [V1, V2])
def test_samples_of_both_versions(make: Callable[[dict[str, str]], Path], folders: dict[str, str]) -> None:
    found = [(s.source, s.pid, s.camid, s.split, s.role) for s in _samples(make(folders))]
    train, test = folders["train"], folders["test"]
    assert found == [
        (f"{train}/0000/0000_013_04_0303morning_0020_2.jpg", "train_0000", 3, "train", "train"),
        (f"{train}/0001/0001_064_14_0303noon_0978_1.jpg", "train_0001", 13, "train", "train"),
        (f"{train}/0000/0000_014_04_0303morning_0020_2_ex.jpg", "train_0000", 3, "val", "gallery"),
        (f"{test}/0000/0000_000_01_0302noon_0001_0.jpg", "test_0000", 0, "test", "query"),
        (f"{test}/0007/0007_000_15_0302noon_0001_0.jpg", "test_0007", 14, "test", "query"),
        (f"{test}/0000/0000_001_02_0302afternoon_0001_0.jpg", "test_0000", 1, "test", "gallery"),
    ]


def test_val_is_trained_on_only_by_name(make: Callable[[dict[str, str]], Path]) -> None:
    root = make(V1)
    rest = {"query": Counts(2, 2, 0, 2), "gallery": Counts(1, 1, 0, 1)}
    found = count_parts(_samples(root), msmt17)
    assert found == {"train": Counts(2, 2, 0, 2), "val": Counts(1, 1, 0, 1), **rest}
    both = _samples(root, "train_val")
    assert count_parts(both, msmt17) == {"train": Counts(2, 3, 0, 2), **rest}
    assert {(s.split, s.role) for s in both[:3]} == {("train", "train")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../list_train.txt 0", r"line 2: '\.\./list_train\.txt' is not a path inside"),
        ("/etc/0_0_01_x.jpg 0", "line 2: .* is not a path inside"),
        ("0000/0000_099_04_0303morning_0020_2.jpg 0", r"line 2: .* does not exist"),
        ("0000/0000_014_04_0303morning_0020_2_ex.jpg", "line 2: .* is not a file and an identity"),
        ("0000/0000_014_04_0303morning_0020_2_ex.jpg -1", "line 2: .* is not a file and an identity"),
        ("0000/0000_014_04_0303morning_0020_2_ex.jpg 1234567", "line 2: .* is not a file and an identity"),
        ("0000/odd.jpg 0", r"line 2: 'odd\.jpg' is not an MSMT17 name"),
        ("0000/0000_000_00_x.jpg 0", "line 2: .* is not an MSMT17 name .* the camera from 01"),
    ],
)
def test_broken_lines(
    make: Callable[[dict[str, str]], Path], line: str, message: str, draw_at: Callable[[Path, int], None]
) -> None:
    root = make(V1)
    for name in ("odd.jpg", "0000_000_00_x.jpg"):
        draw_at(root / "train" / "0000" / name, 1)
    path = root / "list_val.txt"
    path.write_text(path.read_text().strip() + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"list_val\.txt: {message}") as caught:
        _samples(root)
    assert "\n" not in str(caught.value)


def test_wrong_trees(make: Callable[[dict[str, str]], Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds neither train and test \(V1\) or mask_train_v2 and mask_test_v2 \(V2\)"
    ):
        _samples(tmp_path)
    root = make(V1)
    (root / "list_query.txt").rename(root / "query.txt")
    with pytest.raises(UserError, match=r"list_query\.txt: missing; --root is the MSMT17 folder"):
        _samples(root)
    (root / "list_query.txt").write_bytes(b"\xff\xfe0000")
    with pytest.raises(UserError, match=r"list_query\.txt: not UTF-8"):
        _samples(root)
    make(V2)
    with pytest.raises(UserError, match="holds the folders of both versions"):
        _samples(root)
