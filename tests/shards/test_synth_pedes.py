"""SYNTH-PEDES from synthpedes_dataset.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import synth_pedes
from shards.raw import Counts, count_parts

ATTRIBUTES = ["man,black hair,black shirt,pink shorts,black shoes,unknown"]
ENTRIES: list[dict[str, Any]] = [
    {"id": 7, "file_path": "Part1/7/1.jpg", "attributes": ATTRIBUTES,
     "captions": ["A man.", " The man with short hair. "], "prompt_caption": ["A man with black hair."]},
    {"id": 7, "file_path": "Part1/7/2.jpg", "attributes": ["man"],
     "captions": ["One.", "Two.", "Three."], "prompt_caption": ["A man."]},
    {"id": 300000, "file_path": "Part11/300000/1.jpg", "attributes": [],
     "captions": ["A woman."], "prompt_caption": []},
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    for number, entry in enumerate(ENTRIES):
        draw_at(tmp_path / entry["file_path"], number)
    (tmp_path / "synthpedes_dataset.json").write_text(json.dumps(ENTRIES))
    return tmp_path


def test_samples(root: Path) -> None:
    samples = list(synth_pedes.samples(root, "standard"))
    assert [(sample.pid, sample.source) for sample in samples] == [
        ("7", "Part1/7/1.jpg"),
        ("7", "Part1/7/2.jpg"),
        ("300000", "Part11/300000/1.jpg"),
    ]
    assert samples[0].captions == ("A man.", "The man with short hair.")
    assert {(sample.camid, sample.split, sample.role) for sample in samples} == {(-1, "train", "train")}
    assert samples[1].image.read() == (root / "Part1/7/2.jpg").read_bytes()
    assert count_parts(samples, synth_pedes) == {"train": Counts(2, 3, 6, 0)}


def test_prompts(root: Path) -> None:
    samples = list(synth_pedes.samples(root, "prompts"))
    assert samples[0].captions == ("A man.", "The man with short hair.", "A man with black hair.")
    assert samples[2].captions == ("A woman.",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": "../7/1.jpg"}, "entry 1: .* is not a path inside"),
        ({"file_path": "/etc/passwd"}, "entry 1: .* is not a path inside"),
        ({"file_path": "Part1/7/9.jpg"}, "entry 1: .*9.jpg does not exist"),
        ({"id": "7"}, "entry 1: id: "),
        ({"id": -1}, "entry 1: id: "),
        ({"captions": "a man"}, "entry 1: captions: "),
        ({"captions": []}, "entry 1: captions: "),
        ({"captions": [3]}, "entry 1: captions.0: "),
        ({"prompt_caption": "a man"}, "entry 1: prompt_caption: "),
        ({"attributes": "man"}, "entry 1: attributes: "),
    ],
)
def test_hostile_or_broken_annotation(root: Path, change: dict[str, Any], message: str) -> None:
    entries = [dict(entry) for entry in ENTRIES]
    entries[1].update(change)
    (root / "synthpedes_dataset.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message) as caught:
        list(synth_pedes.samples(root, "standard"))
    assert "synthpedes_dataset.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_annotation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"synthpedes_dataset\.json: missing; --root is"):
        list(synth_pedes.samples(tmp_path, "standard"))
