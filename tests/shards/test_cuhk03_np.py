"""CUHK03-NP: PNG files, detected and labelled boxes, two forms of names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import cuhk03_np
from shards.raw import Counts, RawSample, count_parts

FILES = {
    "bounding_box_train": ["1_001_1_01.png", "1_001_2_06.png", "2_001_1_01.png"],
    "query": ["1_002_1_01.png", "5_014_2_10.png"],
    "bounding_box_test": ["1_002_2_06.png", "5_014_1_01.png.png"],
}


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    root = tmp_path / "9_c9_9" / "cuhk03-np"
    for variant in ("detected", "labeled"):
        for folder, names in FILES.items():
            for name in names:
                draw_at(root / variant / folder / name, sum(name.encode()))
            (root / variant / folder / "Thumbs.db").write_bytes(b"x")
    draw_at(root / "labeled" / "bounding_box_train" / "2_001_2_07.png", 5)
    return root


def _samples(root: Path, variant: str = "detected") -> list[RawSample]:
    return list(cuhk03_np.samples(root, variant))


def test_samples(root: Path) -> None:
    assert [(s.source, s.pid, s.camid, s.split, s.role) for s in _samples(root)] == [
        ("detected/bounding_box_train/1_001_1_01.png", "1_001", 0, "train", "train"),
        ("detected/bounding_box_train/1_001_2_06.png", "1_001", 1, "train", "train"),
        ("detected/bounding_box_train/2_001_1_01.png", "2_001", 0, "train", "train"),
        ("detected/query/1_002_1_01.png", "1_002", 0, "test", "query"),
        ("detected/query/5_014_2_10.png", "5_014", 1, "test", "query"),
        ("detected/bounding_box_test/1_002_2_06.png", "1_002", 1, "test", "gallery"),
        ("detected/bounding_box_test/5_014_1_01.png.png", "5_014", 0, "test", "gallery"),
    ]


def test_variants_are_counted_apart(root: Path) -> None:
    rest = {"query": Counts(2, 2, 0, 2), "gallery": Counts(2, 2, 0, 2)}
    # Person 001 of the pairs 1 and 2 are two people.
    assert count_parts(_samples(root), cuhk03_np) == {"train": Counts(2, 3, 0, 2), **rest}
    labelled = _samples(root, "labeled")
    assert count_parts(labelled, cuhk03_np) == {"train": Counts(2, 4, 0, 2), **rest}
    assert all(sample.source.startswith("labeled/") for sample in labelled)


def test_names_in_markets_form(root: Path, draw_at: Callable[[Path, int], None]) -> None:
    draw_at(root / "detected" / "query" / "0003_c2_27.png", 3)
    assert [(s.pid, s.camid) for s in _samples(root) if "0003" in s.source] == [("0003", 1)]


@pytest.mark.parametrize("name", ["1_001_0_01.png", "0001_c0_1.png", "photo.png", "1_1_1.png", "x1_001_1_01.png"])
def test_other_names(root: Path, name: str) -> None:
    (root / "detected" / "query" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name}: not a CUHK03-NP name such as"):
        _samples(root)


def test_missing_folders_and_the_mat_form(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labeled/bounding_box_train: missing; --root is the cuhk03-np folder"):
        _samples(tmp_path, "labeled")
    (tmp_path / "cuhk03_new_protocol_config_detected.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(UserError, match=r"cuhk03_new_protocol_config_detected\.mat is not read, get the folder form"):
        _samples(tmp_path)
    for image in (root / "detected" / "query").glob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match="detected/query: holds no images"):
        _samples(root)
