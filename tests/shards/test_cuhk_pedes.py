"""CUHK-PEDES from reid_raw.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import cuhk_pedes
from shards.raw import Counts, count_parts


def test_samples(cuhk: Path) -> None:
    samples = list(cuhk_pedes.samples(cuhk))
    assert [sample.pid for sample in samples] == ["1", "1", "2", "2", "3", "3", "4", "4", "5", "5"]
    assert [sample.split for sample in samples[4:]] == ["train", "train", "val", "val", "test", "test"]
    assert [sample.role for sample in samples[5:]] == ["train", "gallery", "gallery", "gallery", "gallery"]
    assert samples[0].captions == ("person 1 image 0", "a caption, with é", "third")
    assert samples[0].source == "imgs/cam_a/000.jpg" and samples[0].camid == -1


def test_counts(cuhk: Path) -> None:
    assert count_parts(cuhk_pedes.samples(cuhk), cuhk_pedes) == {
        "train": Counts(3, 6, 13),
        "val": Counts(1, 2, 4),
        "test": Counts(1, 2, 4),
    }
    published = [
        sum(filter(None, part)) for part in zip(*(vars(c).values() for c in cuhk_pedes.EXPECTED.values()), strict=True)
    ]
    assert published == [13_003, 40_206, 80_440]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": "../../etc/passwd"}, r"entry 1: '\.\./\.\./etc/passwd' is not a path inside"),
        ({"file_path": "/etc/passwd"}, "entry 1: .* is not a path inside"),
        ({"file_path": "cam_a/none.jpg"}, "entry 1: .*none.jpg does not exist"),
        ({"split": "dev"}, "entry 1.split: Input should be 'train', 'val' or 'test'"),
        ({"captions": []}, "entry 1.captions"),
        ({"captions": "a man"}, "entry 1.captions"),
        ({"id": "x"}, "entry 1.id"),
    ],
)
def test_hostile_or_broken_annotation(cuhk: Path, change: dict[str, Any], message: str) -> None:
    path = cuhk / "reid_raw.json"
    entries = json.loads(path.read_text())
    entries[1].update(change)
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message) as caught:
        list(cuhk_pedes.samples(cuhk))
    assert "reid_raw.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_other_file(cuhk: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reid_raw\.json: missing; --root is the CUHK-PEDES folder"):
        list(cuhk_pedes.samples(tmp_path))
    (cuhk / "reid_raw.json").write_text("[1, {")
    with pytest.raises(UserError, match="not in the form"):
        list(cuhk_pedes.samples(cuhk))
