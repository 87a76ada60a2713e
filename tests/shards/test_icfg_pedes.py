"""ICFG-PEDES: the split is a field, the folders are MSMT17's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import icfg_pedes
from shards.raw import Counts, count_parts

FILES = [
    ("train", "test/0627/0627_010_05_0303afternoon_1591_0.jpg", 0),
    ("train", "train/0001/0001_010_01_0303morning_0035_1_ex.jpg", 1),
    ("test", "train/0627/0627_000_15_0302noon_0001_2.jpg", 2),
    ("test", "test/0003/renamed.jpg", 3),
]


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    entries = []
    for number, (split, name, pid) in enumerate(FILES):
        draw_at(tmp_path / "imgs" / name, number)
        entries.append({"split": split, "file_path": name, "id": pid, "captions": [f"person {pid}"]})
    (tmp_path / "ICFG-PEDES.json").write_text(json.dumps(entries))
    return tmp_path


def test_samples(root: Path) -> None:
    found = [(s.source, s.pid, s.camid, s.split, s.role, s.captions) for s in icfg_pedes.samples(root, "standard")]
    assert found == [
        (f"imgs/{FILES[0][1]}", "0", 4, "train", "train", ("person 0",)),
        (f"imgs/{FILES[1][1]}", "1", 0, "train", "train", ("person 1",)),
        (f"imgs/{FILES[2][1]}", "2", 14, "test", "gallery", ("person 2",)),
        (f"imgs/{FILES[3][1]}", "3", -1, "test", "gallery", ("person 3",)),
    ]
    counts = count_parts(icfg_pedes.samples(root, "standard"), icfg_pedes)
    assert counts == {"train": Counts(2, 2, 2, 2), "test": Counts(2, 2, 2, 1)}


def test_both_spellings_of_the_annotation(root: Path) -> None:
    first = list(icfg_pedes.samples(root, "standard"))
    (root / "ICFG-PEDES.json").rename(root / "ICFG_PEDES.json")
    assert list(icfg_pedes.samples(root, "standard")) == first
    (root / "ICFG-PEDES.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds ICFG-PEDES\.json and ICFG_PEDES\.json; keep the one"):
        list(icfg_pedes.samples(root, "standard"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": "../ICFG-PEDES.json"}, "is not a path inside"),
        ({"file_path": "train/none.jpg"}, "does not exist"),
        ({"captions": "one sentence"}, "captions: Input should be a valid list"),
    ],
)
def test_broken_entries(root: Path, change: dict[str, Any], message: str) -> None:
    entries = json.loads((root / "ICFG-PEDES.json").read_text())
    entries[2].update(change)
    (root / "ICFG-PEDES.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=rf"ICFG-PEDES\.json: entry 2: .*{message}"):
        list(icfg_pedes.samples(root, "standard"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ICFG-PEDES\.json: missing; --root is the ICFG-PEDES folder"):
        list(icfg_pedes.samples(tmp_path, "standard"))
