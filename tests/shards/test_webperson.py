"""WebPerson: parquet with images, parquet with paths, and 100w.json."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data.sample import MAX_IMAGE_BYTES
from reid_dist.errors import UserError
from shards import webperson
from shards.raw import Counts, count_parts

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": bytes([number]) * (number + 1), "path": None}, "image_path": f"p/{number}.jpg",
         "caption1": f"one {number}", "caption2": f" two {number}\n"}
        for number in range(count)
    ]  # fmt: skip


def _write(path: Path, rows: list[dict[str, Any]], group: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def test_parquet_with_images(tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train-00000-of-00002.parquet", _rows(7))
    _write(tmp_path / "data" / "train-00001-of-00002.parquet", _rows(2))
    samples = list(webperson.samples(tmp_path, "1m"))
    assert [sample.image.read() for sample in samples] == [row["image"]["bytes"] for row in _rows(7) + _rows(2)]
    assert samples[4].captions == ("one 4", "two 4") and samples[4].source == "data/train-00000-of-00002/00000004"
    assert {(sample.pid, sample.camid, sample.split) for sample in samples} == {(None, -1, "train")}
    groups = [sample.image.group for sample in samples]
    assert len(set(groups)) == 4 and groups[:3] == [groups[0]] * 3 and groups[3:6] == [groups[3]] * 3
    assert str(tmp_path / "data/train-00000-of-00002.parquet") in groups[0]
    assert all(sample.image.size > 0 for sample in samples)
    assert count_parts(samples, webperson) == {"train": Counts(9, 9, 18, 0)}


def test_a_row_group_is_decoded_once_for_images_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.parquet", _rows(9))
    decoded: list[int] = []
    real = parquet.ParquetFile.read_row_group

    def counted(file: Any, group: int, columns: list[str]) -> Any:
        decoded.extend([group] * ("image.bytes" in columns))
        return real(file, group, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    webperson._decoded.cache_clear()
    images = [sample.image for sample in webperson.samples(tmp_path, "1m")]
    assert decoded == []  # listing reads no image
    for image in images:
        image.read()
    assert decoded == [0, 1, 2]


def test_parquet_with_paths(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> None:
    rows = [{name: value for name, value in row.items() if name != "image"} for row in _rows(2)]
    _write(tmp_path / "a.parquet", rows)
    for number in range(2):
        draw_at(tmp_path / f"p/{number}.jpg", number)
    samples = list(webperson.samples(tmp_path, "1m"))
    assert [sample.source for sample in samples] == ["p/0.jpg", "p/1.jpg"]
    assert samples[1].image.read() == (tmp_path / "p/1.jpg").read_bytes() and samples[1].image.group == ""
    _write(tmp_path / "a.parquet", [{**rows[0], "image_path": "../x.jpg"}])
    with pytest.raises(UserError, match=r"a\.parquet: row 0: '\.\./x\.jpg' is not a path inside"):
        list(webperson.samples(tmp_path, "1m"))
    _write(tmp_path / "a.parquet", [*rows, {**rows[0], "image_path": None}])
    with pytest.raises(UserError, match=r"a\.parquet: row 2: neither an image nor its path"):
        list(webperson.samples(tmp_path, "1m"))


def test_json(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> None:
    listed = [{"a/0.jpg": {"caption1": "x", "caption2": "y"}}, {"a/1.jpg": {"caption1": "z", "caption2": ""}}]
    (tmp_path / "100w.json").write_text(json.dumps(listed))
    for number in range(2):
        draw_at(tmp_path / f"a/{number}.jpg", number)
    samples = list(webperson.samples(tmp_path, "1m"))
    assert [(sample.source, sample.captions) for sample in samples] == [("a/0.jpg", ("x", "y")), ("a/1.jpg", ("z",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.jpg": {}}, "not a JSON list"),
        (["a.jpg"], "entry 0: not an object"),
        ([{"a.jpg": "x"}], "entry 0: all of it: "),
        ([{"a.jpg": {"caption1": "x"}}], "entry 0: caption2: "),
        ([{"a.jpg": {"caption1": "x", "caption2": 3}}], "entry 0: caption2: "),
        ([{"\ud800.jpg": {"caption1": "x", "caption2": "y"}}], "entry 0: path: .*surrogates"),
        ([{"/a.jpg": {"caption1": "x", "caption2": "y"}}], "entry 0: '/a.jpg' is not a path inside"),
        ([{"a.jpg": {"caption1": "x", "caption2": "y"}}], "entry 0: .*a.jpg does not exist"),
    ],
)
def test_broken_json(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "100w.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        list(webperson.samples(tmp_path, "1m"))
    assert "100w.json" in str(caught.value) and "\n" not in str(caught.value)


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _write(path, _rows(50))
    whole = path.read_bytes()
    for damaged in (b"", b"not parquet", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"a\.parquet: cannot be read as parquet \(.*\); get the file again"
        ) as caught:
            list(webperson.samples(tmp_path, "1m"))
        assert "\n" not in str(caught.value)


def test_parquet_of_another_form(tmp_path: Path) -> None:
    for rows in ([{"text": "x"}], [{"image": b"x", "caption1": "a", "caption2": "b"}]):
        _write(tmp_path / "a.parquet", rows)
        with pytest.raises(UserError, match=r"a\.parquet: not WebPerson \(needs columns image"):
            list(webperson.samples(tmp_path, "1m"))
    _write(tmp_path / "a.parquet", [{**_rows(1)[0], "caption2": None}])
    with pytest.raises(UserError, match=r"a\.parquet: row 0: caption2: "):
        list(webperson.samples(tmp_path, "1m"))
    _write(tmp_path / "a.parquet", [{**_rows(1)[0], "caption2": 4}])
    with pytest.raises(UserError, match=r"a\.parquet: row 0: caption2: "):
        list(webperson.samples(tmp_path, "1m"))


def test_a_row_without_image(tmp_path: Path) -> None:
    rows = _rows(3)
    rows[1]["image"] = {"bytes": None, "path": "p/1.jpg"}
    _write(tmp_path / "a.parquet", rows)
    images = [sample.image for sample in webperson.samples(tmp_path, "1m")]
    assert images[2].read() == rows[2]["image"]["bytes"]
    with pytest.raises(UserError, match=r"a\.parquet: row group 0, row 1: holds no image"):
        images[1].read()


def test_a_giant_image_is_cut_above_the_cap(tmp_path: Path) -> None:
    rows = _rows(1)
    rows[0]["image"]["bytes"] = bytes(MAX_IMAGE_BYTES + 1000)
    _write(tmp_path / "a.parquet", rows)
    image = next(iter(webperson.samples(tmp_path, "1m"))).image
    assert len(image.read()) == MAX_IMAGE_BYTES + 1


def test_neither_or_both_forms(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither parquet files nor 100w\.json"):
        list(webperson.samples(tmp_path, "1m"))
    _write(tmp_path / "a.parquet", _rows(1))
    (tmp_path / "100w.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds parquet files and 100w\.json"):
        list(webperson.samples(tmp_path, "1m"))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.parquet", _rows(1))
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.compute"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'reid_dist\[parquet\]'"):
        list(webperson.samples(tmp_path, "1m"))
