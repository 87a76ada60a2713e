"""The side file of attributes: read where it is, passed over where it is not, refused where it is damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.report.attributes import read_attributes


@pytest.fixture
def shards(tmp_path: Path, write_set: Callable[..., Path]) -> ShardSet:
    return ShardSet(write_set(tmp_path / "set", [("a", 0, "query", []), ("a", 1, "gallery", [])]))


def test_attributes_are_read_by_identity(shards: ShardSet) -> None:
    assert read_attributes(shards) == {}
    (shards.path / "attributes.json").write_text(json.dumps({"attributes": {"toy:a": {"hat": "cap"}}}))
    assert read_attributes(shards) == {"toy:a": {"hat": "cap"}}


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"attributes": {"toy:a": {"hat": 3}}}', '{"attributes": {}, "x": 1}']
)
def test_a_damaged_file_is_named(shards: ShardSet, text: str) -> None:
    (shards.path / "attributes.json").write_text(text)
    with pytest.raises(UserError, match=r"attributes\.json: not attributes by identity \(.*; write it again"):
        read_attributes(shards)


def test_a_file_that_cannot_be_read_is_named(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    (shards.path / "attributes.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"attributes\.json: cannot be read \(Permission denied\)"):
        read_attributes(shards)
