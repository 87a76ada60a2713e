"""RSTPReid: `img_path`, cameras in names, the wrong first split, captions of several people."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards import rstp_reid
from shards.raw import Counts, count_parts

FILES = [
    ("train", "0000_c14_0031.jpg", 0, ["A man in red.", "He walks."]),
    ("train", "0000_c1_0003.jpg", 0, ["a  man in RED.", "人"]),
    ("train", "0001_c5_0022.jpg", 1, ["a man in red.", "He walks."]),
    ("val", "0002_c15_0001.jpg", 2, ["one", "  "]),
    ("test", "0003_c7_0033.jpg.jpg", 3, ["two", "</p>"]),
]


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    entries = []
    for number, (split, name, pid, captions) in enumerate(FILES):
        draw_at(tmp_path / "imgs" / name, number)
        entries.append({"id": pid, "img_path": name, "captions": captions, "split": split})
    (tmp_path / "data_captions.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path


def _change(root: Path, number: int, change: dict[str, Any]) -> None:
    entries = json.loads((root / "data_captions.json").read_text())
    entries[number].update(change)
    (root / "data_captions.json").write_text(json.dumps(entries))


def test_samples(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [(s.source, s.pid, s.camid, s.split, s.role, s.captions) for s in rstp_reid.samples(root, "standard")]
    assert found == [
        ("imgs/0000_c14_0031.jpg", "0", 13, "train", "train", ("A man in red.", "He walks.")),
        ("imgs/0000_c1_0003.jpg", "0", 0, "train", "train", ("a  man in RED.", "人")),
        ("imgs/0001_c5_0022.jpg", "1", 4, "train", "train", ("a man in red.", "He walks.")),
        ("imgs/0002_c15_0001.jpg", "2", 14, "val", "gallery", ("one",)),
        ("imgs/0003_c7_0033.jpg.jpg", "3", 6, "test", "gallery", ("two", "</p>")),
    ]
    # "a man in red." and "he walks." belong to the people 0 and 1.
    assert "data_captions.json: 2 captions are written to several identities" in capsys.readouterr().out
    counts = count_parts(rstp_reid.samples(root, "standard"), rstp_reid)
    assert counts == {"train": Counts(2, 3, 6, 3), "val": Counts(1, 1, 1, 1), "test": Counts(1, 1, 2, 1)}


def test_captions_of_one_identity_are_not_shared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(root, 2, {"captions": ["other", "more"]})
    list(rstp_reid.samples(root, "standard"))
    out = capsys.readouterr().out
    assert ": 0 captions are written to several identities" in out and "cannot tell" not in out


def test_the_wrong_split_of_the_first_release(tmp_path: Path) -> None:
    def entry(pid: int, split: str) -> dict[str, Any]:
        return {"id": pid, "img_path": f"{pid:04d}_c1_0001.jpg", "captions": ["x"], "split": split}

    wrong = [entry(pid, "train" if pid < 3901 else "val" if pid < 4001 else "test") for pid in range(4101)]
    (tmp_path / "data_captions.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"wrong split of the first release \(3,901/100/100 .*corrected file \(3,701"):
        list(rstp_reid.samples(tmp_path, "standard"))
    right = [entry(pid, "train" if pid < 3701 else "val" if pid < 3901 else "test") for pid in range(4101)]
    (tmp_path / "data_captions.json").write_text(json.dumps(right))
    with pytest.raises(UserError, match=r"0000_c1_0001\.jpg does not exist"):
        list(rstp_reid.samples(tmp_path, "standard"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_path": "../../x_c1_1.jpg"}, "is not a path inside"),
        ({"img_path": "0009_c1_0001.jpg"}, "does not exist"),
        ({"img_path": None}, "img_path: Input should be a valid string"),
        ({"split": "query"}, "split"),
        ({"id": "0"}, "id"),
    ],
)
def test_broken_entries(root: Path, change: dict[str, Any], message: str) -> None:
    _change(root, 1, change)
    with pytest.raises(UserError, match=rf"data_captions\.json: entry 1: .*{message}"):
        list(rstp_reid.samples(root, "standard"))


@pytest.mark.parametrize("name", ["a.jpg", "0001_c0_0001.jpg", "0001_0001.jpg", "x/../c_c1/1.jpg"])
def test_names_without_a_camera(root: Path, name: str, draw_at: Callable[[Path, int], None]) -> None:
    if ".." not in name:
        draw_at(root / "imgs" / name, 0)
    _change(root, 1, {"img_path": name})
    with pytest.raises(UserError, match=r"not an RSTPReid name such as 0001_c14_0033\.jpg|not a path inside"):
        list(rstp_reid.samples(root, "standard"))


def test_the_key_of_other_sets(root: Path) -> None:
    entries = json.loads((root / "data_captions.json").read_text())
    entries[0]["file_path"] = entries[0].pop("img_path")
    (root / "data_captions.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="entry 0: img_path: Field required"):
        list(rstp_reid.samples(root, "standard"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_captions\.json: missing; --root is the RSTPReid folder"):
        list(rstp_reid.samples(tmp_path, "standard"))
