"""Tars, index and manifest."""

import hashlib
import tarfile
from pathlib import Path

import pytest
import webdataset

from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import Sample
from reid_dist.errors import UserError
from shards.index import ShardWriter, file_sha256


def _sample(number: int, **change: object) -> Sample:
    fields = {
        "dataset": "x",
        "pid": f"x:{9 - number // 2}",
        "camid": number % 2,
        "split": "train",
        "role": "train",
        "captions": ["a"] * number,
        "source": f"{number}.jpg",
        "width": 1,
        "height": 1,
        "sha256": hashlib.sha256(_image(number)).hexdigest(),
    }
    return Sample.model_validate({**fields, **change})


def _image(number: int) -> bytes:
    return b"\xff\xd8" + bytes([number]) * (700 * number)


def _write(folder: Path, shard_bytes: int = 6_000) -> Path:
    folder.mkdir()
    writer = ShardWriter(folder, "x", shard_bytes)
    for number in range(8):
        writer.add(f"k{number}", _sample(number), _image(number))
    writer.finish({"licence": "none"})
    return folder


def test_two_builds_are_identical(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a"), _write(tmp_path / "b")
    names = sorted(path.name for path in a.iterdir())
    assert names[:2] == ["index.npy", "manifest.json"] and len(names) > 4
    assert [file_sha256(a / name) for name in names] == [file_sha256(b / name) for name in names]


def test_reader_finds_everything(tmp_path: Path) -> None:
    shards = ShardSet(_write(tmp_path / "a"))
    assert shards.identities == ["x:6", "x:7", "x:8", "x:9"]
    for row in range(8):
        assert shards.image_bytes(row) == _image(row)
        assert shards.sample(row) == _sample(row)
        assert shards.identities[shards.index["pid"][row]] == f"x:{9 - row // 2}"
    for shard in shards.manifest.shards:
        assert shard.bytes <= 6_000 + 10_240 and shard.sha256 == file_sha256(shards.path / shard.name)
    assert sum(shard.samples for shard in shards.manifest.shards) == 8
    assert shards.manifest.card == {"licence": "none"}


def test_headers_tell_nothing(tmp_path: Path) -> None:
    for path in _write(tmp_path / "a").glob("*.tar"):
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
        assert [m.name.split(".")[1] for m in members] == ["jpg", "json"] * (len(members) // 2)
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.isreg() and member.pax_headers == {}


def test_plain_webdataset_opens_them(tmp_path: Path) -> None:
    urls = sorted(str(path) for path in _write(tmp_path / "a").glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["__key__"] for item in found] == [f"k{number}" for number in range(8)]
    assert all(item["jpg"] == _image(number) for number, item in enumerate(found))
    assert Sample.model_validate_json(found[5]["json"]) == _sample(5)


@pytest.mark.parametrize("key", ["", "a.b", "../a", "x" * 96, "ä"])
def test_bad_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="is not a sample key"):
        ShardWriter(tmp_path, "x").add(key, _sample(1), _image(1))


def test_longest_key(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x")
    writer.add("y" * 95, _sample(1), _image(1))
    writer.finish({})
    assert ShardSet(tmp_path).key(0) == "y" * 95


def test_refusals(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x")
    with pytest.raises(UserError, match="no samples"):
        writer.finish({})
    writer.add("a", _sample(1), _image(1))
    with pytest.raises(UserError, match="already taken"):
        writer.add("a", _sample(1), _image(1))
    with pytest.raises(UserError, match=r"a record of .* bytes"):
        writer.add("b", _sample(1, captions=["x" * 70_000]), _image(1))
    with pytest.raises(UserError, match="20000001 bytes"):
        writer.add("c", _sample(1), bytes(20_000_001))
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        ShardSet(tmp_path)
