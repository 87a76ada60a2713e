"""Foreign JSON and text: read strictly, refused in one line."""

import io
import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from reid_dist.errors import UserError
from shards.forms.annotation import Text, bounded_lines, entries, files_below, read_json, sentences


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: Text
    number: int


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, {", "not JSON"),
        (b'["\xff"]', "not JSON .*utf-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b"", "not JSON"),
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path, "get it again")
    assert str(path) in str(caught.value) and "get it again" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: missing; get it"):
        read_json(tmp_path / "none.json", "get it")


def test_entries_are_strict_and_placed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"name": "a", "number": 1, "other": []}, {"name": "b", "number": "2"}]))
    found = entries(path, _Entry, "get it again")
    assert next(found) == (f"{path}: entry 0", _Entry(name="a", number=1))
    with pytest.raises(UserError, match=r"a\.json: entry 1: number: .* integer; get it again"):
        next(found)
    path.write_text('{"name": "a"}')
    with pytest.raises(UserError, match="not a JSON list"):
        list(entries(path, _Entry, ""))
    path.write_text('["a"]')
    with pytest.raises(UserError, match="entry 0: all of it: "):
        list(entries(path, _Entry, ""))
    path.write_text('[{"name": "\\ud800", "number": 1}]')
    with pytest.raises(UserError, match=r"entry 0: name: .*surrogates"):
        list(entries(path, _Entry, ""))


def test_sentences() -> None:
    assert sentences([" a man\n", "", " \t", "b"]) == ("a man", "b")


def test_lines_are_bounded() -> None:
    assert list(bounded_lines(io.StringIO("ab\ncde\n\nf"), "x", 4)) == ["ab\n", "cde\n", "\n", "f"]
    lines = bounded_lines(io.StringIO("ab\n" + "c" * 100), "x.csv", 10)
    assert next(lines) == "ab\n"
    with pytest.raises(UserError, match=r"x\.csv: line 2: more than 10 characters"):
        next(lines)
    raw = io.TextIOWrapper(io.BytesIO(b"ab\n\xff\xfe\n"), encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.csv: line .*: not UTF-8"):
        list(bounded_lines(raw, "x.csv", 10))


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("b.tar", "a/c.tar", "._b.tar", ".cache/d.tar", "b.tar.md5", "e.tar/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert files_below(tmp_path, ".tar") == [tmp_path / "a/c.tar", tmp_path / "b.tar"]
