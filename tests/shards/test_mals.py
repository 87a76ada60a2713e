"""MALS from gene_attrs/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import mals
from shards.raw import Counts, count_parts


def _entry(folder: str, number: int, caption: str) -> dict[str, Any]:
    label = [1, 0, -1] * 9
    return {"image": f"gene_crop/{folder}/{number}.jpg", "caption": caption, "image_id": f"{folder}_{number}",
            "label": label}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    files = {
        "g_4x_attrs.json": [_entry("4x", 3, "a boy")],
        "g_c_g_a_0_attrs.json": [_entry("c_g_a_0", 0, "a young boy"), _entry("c_g_a_0", 20217, "a woman\n")],
        "g_i_g_a_43_attrs.json": [_entry("i_g_a_43", 0, "a man")],
    }
    (tmp_path / "gene_attrs").mkdir()
    for name, entries in files.items():
        (tmp_path / "gene_attrs" / name).write_text(json.dumps(entries))
        for number, entry in enumerate(entries):
            draw_at(tmp_path / entry["image"], number)
    (tmp_path / "gene_attrs" / "readme.json").write_text("{")  # not one of the annotations
    return tmp_path


def test_samples(root: Path) -> None:
    samples = list(mals.samples(root, "standard"))
    assert [(sample.source, sample.captions) for sample in samples] == [
        ("gene_crop/4x/3.jpg", ("a boy",)),
        ("gene_crop/c_g_a_0/0.jpg", ("a young boy",)),
        ("gene_crop/c_g_a_0/20217.jpg", ("a woman",)),
        ("gene_crop/i_g_a_43/0.jpg", ("a man",)),
    ]
    assert {(sample.pid, sample.camid, sample.split) for sample in samples} == {(None, -1, "train")}
    assert count_parts(samples, mals) == {"train": Counts(4, 4, 4, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "../x.jpg"}, "entry 1: .* is not a path inside"),
        ({"image": "gene_crop/c_g_a_0/9.jpg"}, "entry 1: .*9.jpg does not exist"),
        ({"caption": ["a man"]}, "entry 1: caption: "),
        ({"caption": " "}, "entry 1: caption: "),
        ({"label": [1] * 26}, "entry 1: label: "),
        ({"label": [2] * 27}, "entry 1: label.0: "),
        ({"image_id": 4}, "entry 1: image_id: "),
        ({"image_id": "c_g_a_0_0"}, "entry 1: image_id 'c_g_a_0_0' occurs twice"),
    ],
)
def test_hostile_or_broken_annotation(root: Path, change: dict[str, Any], message: str) -> None:
    path = root / "gene_attrs" / "g_c_g_a_0_attrs.json"
    entries = json.loads(path.read_text())
    entries[1].update(change)
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message) as caught:
        list(mals.samples(root, "standard"))
    assert "g_c_g_a_0_attrs.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_annotations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gene_attrs: holds no g_\*_attrs\.json; --root is"):
        list(mals.samples(tmp_path, "standard"))
