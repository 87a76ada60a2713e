"""UFine6926: one JSON of any name beside `images/`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import ufine6926
from shards.raw import Counts, count_parts


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    entries = []
    for number, (split, pid) in enumerate([("train", 1), ("train", 1), ("test", 2)], start=1):
        draw_at(tmp_path / "images" / f"{number}.jpg", number)
        captions = [" ".join(["long"] * 120), "short"]
        entries.append({"split": split, "id": pid, "file_path": f"images/{number}.jpg", "captions": captions})
    (tmp_path / "annotations.json").write_text(json.dumps(entries))
    return tmp_path


def test_samples(root: Path) -> None:
    samples = list(ufine6926.samples(root, "standard"))
    assert [(s.source, s.pid, s.camid, s.split, s.role) for s in samples] == [
        ("images/1.jpg", "1", -1, "train", "train"),
        ("images/2.jpg", "1", -1, "train", "train"),
        ("images/3.jpg", "2", -1, "test", "gallery"),
    ]
    # Nothing is cut here: that is the tokenizer's affair.
    assert len(samples[0].captions[0].split()) == 120
    assert count_parts(samples, ufine6926) == {"train": Counts(1, 2, 4, 0), "test": Counts(1, 1, 2, 0)}


def test_the_annotation_must_be_the_only_json(root: Path) -> None:
    (root / "world.json").write_text("{}")  # of a procedural tree
    assert len(list(ufine6926.samples(root, "standard"))) == 3
    (root / "more.json").write_text("[]")
    with pytest.raises(UserError, match=r"exactly one \.json .*found: annotations\.json, more\.json"):
        list(ufine6926.samples(root, "standard"))
    (root / "more.json").unlink()
    (root / "annotations.json").unlink()
    with pytest.raises(UserError, match=r"exactly one \.json .*found: none; --root is the UFine6926 folder"):
        list(ufine6926.samples(root, "standard"))


def test_files_outside_and_wrong_types(root: Path) -> None:
    entries = json.loads((root / "annotations.json").read_text())
    for change, message in [
        ({"file_path": "/etc/passwd"}, "entry 0: .* is not a path inside"),
        ({"file_path": "1.jpg"}, "entry 0: .*1.jpg does not exist"),
        ({"id": "1"}, "entry 0: id"),
    ]:
        (root / "annotations.json").write_text(json.dumps([entries[0] | change]))
        with pytest.raises(UserError, match=message):
            list(ufine6926.samples(root, "standard"))
