"""Flickr30k in Karpathy's split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import flickr30k
from shards.raw import Counts, count_parts


def _entry(name: str, split: str, captions: list[str]) -> dict[str, Any]:
    sentences = [{"tokens": text.split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(captions)]
    return {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name}


ENTRIES = [
    _entry("1000092795.jpg", "train", ["Two young guys.", "Two men. "]),
    _entry("36979.jpg", "val", ["A group."]),
    _entry("1007129816.jpg", "test", ["The man.", " ", "A man in a hat."]),
]


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    for number, entry in enumerate(ENTRIES):
        draw_at(tmp_path / "flickr30k-images" / entry["filename"], number)
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": ENTRIES, "dataset": "flickr30k"}))
    return tmp_path


def test_samples(root: Path) -> None:
    samples = list(flickr30k.samples(root, "standard"))
    assert [(sample.source, sample.split, sample.role, sample.captions) for sample in samples] == [
        ("flickr30k-images/1000092795.jpg", "train", "train", ("Two young guys.", "Two men.")),
        ("flickr30k-images/36979.jpg", "val", "gallery", ("A group.",)),
        ("flickr30k-images/1007129816.jpg", "test", "gallery", ("The man.", "A man in a hat.")),
    ]
    assert count_parts(samples, flickr30k)["test"] == Counts(1, 1, 2, 0)


@pytest.mark.parametrize("folder", ["flickr30k_images", "images"])
def test_other_folders(root: Path, folder: str) -> None:
    (root / "flickr30k-images").rename(root / folder)
    assert next(iter(flickr30k.samples(root, "standard"))).source == f"{folder}/1000092795.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "../36979.jpg"}, "image 1: .* is not a path inside"),
        ({"filename": "1.jpg"}, "image 1: .*1.jpg does not exist"),
        ({"filename": 36979}, "image 1: filename: "),
        ({"split": "testing"}, "image 1: split: "),
        ({"sentences": [{"tokens": []}]}, "image 1: sentences.0.raw: "),
    ],
)
def test_broken_annotation(root: Path, change: dict[str, Any], message: str) -> None:
    entries = [dict(entry) for entry in ENTRIES]
    entries[1].update(change)
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match=message) as caught:
        list(flickr30k.samples(root, "standard"))
    assert "dataset_flickr30k.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_parts(root: Path, tmp_path: Path) -> None:
    (root / "dataset_flickr30k.json").unlink()
    with pytest.raises(UserError, match=r"dataset_flickr30k\.json: missing; --root is"):
        list(flickr30k.samples(root, "standard"))
    with pytest.raises(UserError, match="holds none of the folders flickr30k-images"):
        list(flickr30k.samples(tmp_path / "none", "standard"))
