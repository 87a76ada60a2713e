"""CUHK-PEDES from reid_raw.json and caption_all.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import cuhk_pedes
from shards.raw import Counts, RawSample, count_parts


def _samples(root: Path, variant: str = "standard") -> list[RawSample]:
    return list(cuhk_pedes.samples(root, variant))


def _write_caption_all(root: Path, **change: Any) -> None:
    entries = json.loads((root / "reid_raw.json").read_text())
    kept = [{key: entry[key] for key in ("id", "file_path", "captions")} | change for entry in entries]
    (root / "caption_all.json").write_text(json.dumps(kept))


def test_samples(cuhk: Path) -> None:
    samples = _samples(cuhk)
    assert [sample.pid for sample in samples] == ["1", "1", "2", "2", "3", "3", "4", "4", "5", "5"]
    assert [sample.split for sample in samples[4:]] == ["train", "train", "val", "val", "test", "test"]
    assert [sample.role for sample in samples[5:]] == ["train", "gallery", "gallery", "gallery", "gallery"]
    assert samples[0].captions == ("person 1 image 0", "a caption, with é", "third")
    assert samples[0].source == "imgs/cam_a/000.jpg" and samples[0].camid == -1
    assert samples[0].image.read() == (cuhk / "imgs/cam_a/000.jpg").read_bytes()


def test_caption_all_has_no_split_and_is_all_train(cuhk: Path) -> None:
    (cuhk / "reid_raw.json").rename(cuhk / "hidden.json")
    with pytest.raises(UserError, match=r"reid_raw\.json: missing"):
        _samples(cuhk)
    (cuhk / "hidden.json").rename(cuhk / "reid_raw.json")
    _write_caption_all(cuhk)
    samples = _samples(cuhk, "caption_all")
    assert {(sample.split, sample.role) for sample in samples} == {("train", "train")}
    assert [sample.captions for sample in samples] == [sample.captions for sample in _samples(cuhk)]
    assert count_parts(samples, cuhk_pedes) == {"train": Counts(5, 10, 21, 0)}
    # A file that does tell splits is another one: its test set would be lost.
    _write_caption_all(cuhk, split="test")
    with pytest.raises(UserError, match=r"caption_all\.json: entry 0: split"):
        _samples(cuhk, "caption_all")


def test_counts(cuhk: Path) -> None:
    assert count_parts(_samples(cuhk), cuhk_pedes) == {
        "train": Counts(3, 6, 13, 0),
        "val": Counts(1, 2, 4, 0),
        "test": Counts(1, 2, 4, 0),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": "../../etc/passwd"}, r"entry 1: '\.\./\.\./etc/passwd' is not a path inside"),
        ({"file_path": "/etc/passwd"}, "entry 1: .* is not a path inside"),
        ({"file_path": "cam_a/none.jpg"}, "entry 1: .*none.jpg does not exist"),
        ({"file_path": "cam_a"}, "entry 1: .*cam_a does not exist"),
        ({"file_path": 7}, "entry 1: file_path"),
        ({"split": "dev"}, "entry 1: split: Input should be 'train', 'val' or 'test'"),
        ({"split": "test"}, "entry 1: identity 1 is in the splits train and test"),
        ({"captions": []}, "entry 1: captions"),
        ({"captions": "a man"}, "entry 1: captions"),
        ({"captions": ["a man", None]}, "entry 1: captions.1"),
        ({"captions": ["a \ud800"]}, "entry 1: captions.0"),
        ({"id": "1"}, "entry 1: id"),
        ({"id": 1.5}, "entry 1: id"),
        ({"id": True}, "entry 1: id"),
        ({"id": -1}, "entry 1: id"),
    ],
)
def test_hostile_or_broken_annotation(cuhk: Path, change: dict[str, Any], message: str) -> None:
    path = cuhk / "reid_raw.json"
    entries = json.loads(path.read_text())
    entries[1].update(change)
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message) as caught:
        _samples(cuhk)
    assert "reid_raw.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[1, {", b"{}", b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_another_file(cuhk: Path, content: bytes) -> None:
    (cuhk / "reid_raw.json").write_bytes(content)
    with pytest.raises(UserError, match=r"reid_raw\.json: .*get a damaged file again"):
        _samples(cuhk)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reid_raw\.json: missing; --root is the CUHK-PEDES folder"):
        _samples(tmp_path)
