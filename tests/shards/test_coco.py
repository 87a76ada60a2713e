"""COCO captions: the official JSON and Karpathy's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import coco
from shards.raw import Counts, count_parts


def _official(images: dict[int, list[str]]) -> dict[str, Any]:
    annotations = [{"image_id": image, "caption": text} for image, texts in images.items() for text in texts]
    return {
        "info": {},
        "licenses": [],
        "images": [{"id": image, "file_name": f"{image:012d}.jpg", "license": 3, "height": 4} for image in images],
        # Captions of an image are not beside each other in the real file.
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(annotations[::2] + annotations[1::2])],
    }


TRAIN = _official({9: ["a cat", " a dog\n", "x", "y", "z", "sixth"], 25: ["a giraffe"]})
VAL = _official({139: ["a room", ""]})
ENTRIES: list[dict[str, Any]] = [
    {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train", "cocoid": 9,
     "sentences": [{"tokens": ["a"], "raw": f"caption {n}", "imgid": 0, "sentid": n} for n in range(6)]},
    {"filepath": "val2014", "filename": "COCO_val2014_000000000025.jpg", "split": "restval", "cocoid": 25,
     "sentences": [{"raw": "a giraffe "}]},
    {"filepath": "val2014", "filename": "COCO_val2014_000000000139.jpg", "split": "val", "cocoid": 139,
     "sentences": [{"raw": "a room"}]},
    {"filepath": "val2014", "filename": "COCO_val2014_000000000500.jpg", "split": "test", "cocoid": 500,
     "sentences": [{"raw": "a bus"}]},
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    places = ["train2017/000000000009.jpg", "train2017/000000000025.jpg", "val2017/000000000139.jpg",
              "val2014/COCO_val2014_000000000500.jpg"]  # fmt: skip
    for number, place in enumerate(places):
        draw_at(tmp_path / place, number)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(TRAIN))
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(VAL))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": ENTRIES, "dataset": "coco"}))
    return tmp_path


def test_official(root: Path) -> None:
    samples = list(coco.samples(root, "official"))
    assert [(sample.source, sample.split, sample.role) for sample in samples] == [
        ("train2017/000000000009.jpg", "train", "train"),
        ("train2017/000000000025.jpg", "train", "train"),
        ("val2017/000000000139.jpg", "val", "gallery"),
    ]
    assert sorted(samples[0].captions) == ["a cat", "a dog", "sixth", "x", "y", "z"]
    assert samples[1].captions == ("a giraffe",) and samples[2].captions == ("a room",)
    assert {(sample.pid, sample.camid) for sample in samples} == {(None, -1)}
    assert count_parts(samples, coco) == {"train": Counts(2, 2, 7, 0), "val": Counts(1, 1, 1, 0)}


def test_karpathy_finds_images_of_both_years(root: Path) -> None:
    samples = list(coco.samples(root, "karpathy"))
    assert [(sample.source, sample.split, sample.role) for sample in samples] == [
        ("train2017/000000000009.jpg", "train", "train"),
        ("train2017/000000000025.jpg", "train", "train"),  # restval
        ("val2017/000000000139.jpg", "val", "gallery"),
        ("val2014/COCO_val2014_000000000500.jpg", "test", "gallery"),
    ]
    assert samples[0].captions == tuple(f"caption {n}" for n in range(6)) and samples[1].captions == ("a giraffe",)


def test_other_places(root: Path) -> None:
    (root / "images").mkdir()
    for name in ("train2017", "val2017", "val2014"):
        (root / name).rename(root / "images" / name)
    (root / "dataset_coco.json").rename(root / "annotations" / "dataset_coco.json")
    for name in ("captions_train2017.json", "captions_val2017.json"):
        (root / "annotations" / name).rename(root / name)
    assert [sample.source for sample in coco.samples(root, "official")][2] == "images/val2017/000000000139.jpg"
    last = "images/val2014/COCO_val2014_000000000500.jpg"
    assert [sample.source for sample in coco.samples(root, "karpathy")][3] == last
    (root / "captions_train2017.json").unlink()
    assert len(list(coco.samples(root, "official"))) == 1


def test_published_counts_are_divisions_of_the_same_photographs() -> None:
    # The sentences of train2014 and val2014 together, as both forms use them.
    for variant in ("official", "karpathy"):
        parts = coco.EXPECTED[variant].values()
        assert sum(part.images or 0 for part in parts) == 123_287
        assert sum(part.captions or 0 for part in parts) == 616_767


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("images", {"file_name": "../x.jpg"}, "image 1: .* is not a path inside"),
        ("images", {"file_name": "1.jpg"}, "image 1: .*1.jpg does not exist"),
        ("images", {"id": "25"}, "image 1: id: "),
        ("images", {"id": 26}, "image 1: id 26 has no caption"),
        ("annotations", {"image_id": 77}, "captions of image 77, which is not among its images"),
        ("annotations", {"caption": ["x"]}, "annotation 1: caption: "),
        ("annotations", {"caption": None}, "annotation 1: caption: "),
    ],
)
def test_broken_official_annotation(root: Path, key: str, change: dict[str, Any], message: str) -> None:
    content = json.loads(json.dumps(TRAIN))
    content[key][1].update(change)
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        list(coco.samples(root, "official"))
    assert "captions_train2017.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "../x.jpg"}, "image 1: .* is not a path inside"),
        ({"cocoid": 4}, "image 1: .*COCO_val2014_000000000025.jpg does not exist"),
        ({"split": "dev"}, "image 1: split: "),
        ({"sentences": []}, "image 1: sentences: "),
        ({"sentences": ["a"]}, "image 1: sentences.0: "),
        ({"sentences": [{"raw": 3}]}, "image 1: sentences.0.raw: "),
        ({"cocoid": "25"}, "image 1: cocoid: "),
    ],
)
def test_broken_karpathy_annotation(root: Path, change: dict[str, Any], message: str) -> None:
    entries = json.loads(json.dumps(ENTRIES))
    entries[1].update(change)
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match=message) as caught:
        list(coco.samples(root, "karpathy"))
    assert "dataset_coco.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_other_annotations(root: Path) -> None:
    (root / "dataset_coco.json").write_text("[]")
    with pytest.raises(UserError, match="has no list `images`"):
        list(coco.samples(root, "karpathy"))
    (root / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="has no lists `images` and `annotations`"):
        list(coco.samples(root, "official"))
    for path in (root / "annotations").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds neither .*; for its dataset_coco.json choose the variant karpathy"):
        list(coco.samples(root, "official"))
    (root / "dataset_coco.json").unlink()
    with pytest.raises(UserError, match=r"holds neither .*2017\.json; --root"):
        list(coco.samples(root, "official"))
    with pytest.raises(UserError, match=r"dataset_coco\.json: missing; --root"):
        list(coco.samples(root, "karpathy"))
