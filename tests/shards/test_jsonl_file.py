"""One's own data as jsonl."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import jsonl_file
from shards.raw import Counts, RawSample, count_parts

LINES = [
    {"path": "in/a.jpg", "pid": 7, "camid": 0, "captions": [" a man ", "", "he"], "caption": "first"},
    {"path": "in/b.jpg", "pid": "7"},
    {"path": "c.jpg", "pid": "x", "split": "test", "caption": "a woman", "camid": -1},
    {"path": "in//b.jpg", "pid": "7", "caption": "later"},
    {"path": "in/d.jpg", "pid": None, "split": "val", "role": "query"},
]


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    root = tmp_path / "own"
    for number, name in enumerate(["in/a.jpg", "in/b.jpg", "c.jpg", "in/d.jpg"]):
        draw_at(root / name, number)
    (root / "people.jsonl").write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return root


def read(root: Path) -> list[RawSample]:
    return list(jsonl_file.samples(root, "standard"))


def test_samples(root: Path) -> None:
    assert [(s.source, s.pid, s.camid, s.split, s.role, s.captions) for s in read(root)] == [
        ("in/a.jpg", "7", 0, "train", "train", ("first", "a man", "he")),
        ("in/b.jpg", "7", -1, "train", "train", ("later",)),
        ("c.jpg", "x", -1, "test", "gallery", ("a woman",)),
        ("in/d.jpg", None, -1, "val", "query", ()),
    ]
    assert count_parts(read(root), jsonl_file)["train"] == Counts(1, 2, 4, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "c.jpg"', "not JSON"),
        ('["c.jpg"]', "all of it: "),
        ("[" * 100_000, "not JSON"),
        ('{"path": "c.jpg", "path": "in/a.jpg"}', "the key 'path' occurs twice"),
        ('{"path": "c.jpg", "pidd": 1}', "pidd: Extra inputs are not permitted; .*known keys are path, pid"),
        ('{"pid": "1"}', "path: Field required"),
        ('{"path": ""}', "path: "),
        ('{"path": 3}', "path: "),
        ('{"path": "c.jpg", "pid": 1.5}', "pid"),
        ('{"path": "c.jpg", "pid": true}', "pid"),
        ('{"path": "c.jpg", "camid": "1"}', "camid: "),
        ('{"path": "c.jpg", "camid": true}', "camid: "),
        ('{"path": "c.jpg", "camid": 2147483648}', "camid: "),
        ('{"path": "c.jpg", "captions": "a man"}', "captions: "),
        ('{"path": "c.jpg", "captions": [1]}', "captions.0: "),
        ('{"path": "c.jpg", "caption": "\\ud800"}', "caption: .*surrogates"),
        ('{"path": "../c.jpg"}', "is not a path inside"),
        ('{"path": "z.jpg"}', "z.jpg does not exist"),
        ('{"path": "c.jpg", "split": "dev"}', "split: "),
        ('{"path": "c.jpg", "role": "gallery"}', "the role gallery does not go with the split train"),
        ('{"path": "c.jpg", "pid": "7", "split": "test"}', "pid '7' is in test and, in .*jsonl: line 1, in train"),
        ('{"path": "in/a.jpg", "pid": 8}', "has another pid.* than in .*jsonl: line 1"),
    ],
)
def test_wrong_lines(root: Path, line: str, message: str) -> None:
    path = root / "people.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read(root)
    assert f"{path}: line 3: " in str(caught.value) and "\n" not in str(caught.value)


def test_other_files(root: Path, tmp_path: Path) -> None:
    (root / "people.jsonl").write_bytes(b'{"path": "\xe4"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read(root)
    (root / "people.jsonl").write_text('{"path": "' + "a" * 1_000_000)
    with pytest.raises(UserError, match="line 1: more than 1000000 characters"):
        read(root)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: holds no \*\.jsonl"):
        read(tmp_path / "none")
