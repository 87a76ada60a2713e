"""Reading shard sets by index, and refusing what is not one."""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data import byte_ranges
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import content_digest
from reid_dist.errors import UserError

Build = Callable[..., Path]


def test_reads_what_was_written(build: Build) -> None:
    shards = ShardSet(build())
    assert len(shards) == 22 and shards.name == "tiny" and len(shards.manifest.shards) > 1
    for row in range(len(shards)):
        sample = shards.sample(row)
        assert shards.key(row) == f"s{row:03d}"
        assert sample.source == f"{row}.jpg"
        assert shards.image_bytes(row).startswith(b"\xff\xd8")
        entry = shards.index[row]
        assert shards.identities[entry["pid"]] == sample.pid
        assert (entry["camid"], entry["captions"]) == (sample.camid, len(sample.captions))


def test_rows_by_split_and_role(build: Build) -> None:
    shards = ShardSet(build())
    assert shards.rows().tolist() == list(range(22))
    assert shards.rows("train").tolist() == list(range(15))
    assert shards.rows("test", ["query", "junk"]).tolist() == [19, 20, 21]
    assert shards.rows("val").tolist() == []
    assert shards.rows("val").dtype == np.int64


def test_counts_in_the_manifest_leave_out_junk_identities(build: Build) -> None:
    splits = ShardSet(build()).manifest.splits
    assert splits["test"].model_dump() == {"images": 7, "identities": 2, "captions": 14, "cameras": 3}
    assert splits["train"].identities == 5 and "val" not in splits


def test_pickle_and_fork(build: Build) -> None:
    shards = ShardSet(build())
    expected = shards.image_bytes(3)  # opens a descriptor that must not travel
    copy = pickle.loads(pickle.dumps(shards))
    assert copy._ranges._descriptors == {} and copy.image_bytes(3) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(shards.image_bytes, [3, 3]) == [expected, expected]


def test_few_descriptors_stay_open(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "MAX_OPEN_FILES", 1)
    shards = ShardSet(build(shard_bytes=4_000))
    keys = [shards.key(row) for row in [0, 21, 0, 21, 10]]
    assert keys == ["s000", "s021", "s000", "s021", "s010"]
    assert len(shards._ranges._descriptors) == 1


def test_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such shard folder; .*python -m shards\.write NAME --root"):
        ShardSet(tmp_path / "nowhere")


def _drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1')


def _future_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))


def _drop_index(folder: Path) -> None:
    (folder / "index.npy").unlink()


def _replace_index(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index["camid"] += 1
    np.save(folder / "index.npy", index)


def _drop_shard(folder: Path) -> None:
    (folder / "tiny-000001.tar").unlink()


def _cut_shard(folder: Path) -> None:
    shard = folder / "tiny-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_manifest, r"manifest\.json: missing"),
        (_break_manifest, r"manifest\.json: not a valid manifest"),
        (_future_manifest, r"manifest\.json: not a valid manifest \(format_version"),
        (_drop_index, r"index\.npy: missing"),
        (_replace_index, r"index\.npy: its sha256"),
        (_drop_shard, r"tiny-000001\.tar: missing shard"),
        (_cut_shard, r"tiny-000000\.tar: \d+ bytes, but manifest\.json says \d+"),
    ],
)
def test_damage_is_one_clear_line(build: Build, damage: Callable[[Path], None], message: str) -> None:
    folder = build()
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        ShardSet(folder)
    assert "\n" not in str(caught.value) and "python -m shards.write" in str(caught.value)


def _unhashed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["index_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard", 99, "shard that is not listed"),
        ("shard", 0, "other numbers of samples"),
        ("pid", 99, "identity that is not listed"),
        ("role", 9, "unknown role"),
        ("split", -1, "unknown split"),
        ("captions", -1, "more captions than"),
        ("captions", 2_000_000_000, "more captions than"),
        ("image_size", 2_000_000_000, "above the cap"),
        ("json_size", 70_000, "above the cap"),
        ("image_offset", 2**62, "outside its shard"),
        ("json_offset", -5, "outside its shard"),
    ],
)
def test_index_values_are_checked(build: Build, field: str, value: int, message: str) -> None:
    folder = build()
    _unhashed(folder)
    index = np.load(folder / "index.npy")
    index[field][-1] = value
    np.save(folder / "index.npy", index)
    with pytest.raises(UserError, match=re.escape(message)):
        ShardSet(folder)


def test_index_of_another_kind_and_pickles_are_refused(build: Build) -> None:
    folder = build()
    _unhashed(folder)
    np.save(folder / "index.npy", np.zeros(22))
    with pytest.raises(UserError, match="another dtype"):
        ShardSet(folder)
    np.save(folder / "index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable index"):
        ShardSet(folder)


def _damage(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("kind", "what"), [("image", "image"), ("json", "JSON record")])
def test_a_flipped_bit_names_the_sample(build: Build, kind: str, what: str) -> None:
    folder = build()
    shards = ShardSet(folder)
    entry = shards.index[2]
    # In the last byte: no decoder and no parser would notice.
    _damage(folder / "tiny-000000.tar", int(entry[f"{kind}_offset"] + entry[f"{kind}_size"]) - 1)
    read = shards.image_bytes if kind == "image" else shards.sample
    with pytest.raises(
        UserError, match=rf"shard tiny-000000\.tar, sample s002: the {what} is damaged .*sha256"
    ) as caught:
        read(2)
    assert "python -m shards.write" in str(caught.value) and "\n" not in str(caught.value)
    assert shards.image_bytes(1) and shards.sample(1)


def test_a_record_that_is_none_names_the_sample(build: Build) -> None:
    folder = build()
    _unhashed(folder)
    index = np.load(folder / "index.npy")
    index["json_size"][2] -= 1
    start, size = int(index["json_offset"][2]), int(index["json_size"][2])
    tar = (folder / "tiny-000000.tar").read_bytes()
    index["json_digest"][2] = content_digest(tar[start : start + size])
    np.save(folder / "index.npy", index)
    with pytest.raises(UserError, match=r"sample s002: the JSON record is damaged \(Invalid JSON"):
        ShardSet(folder).sample(2)


def test_a_shard_that_vanishes_is_named(build: Build) -> None:
    folder = build()
    shards = ShardSet(folder)
    (folder / "tiny-000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"tiny \(tiny\), shard tiny-000000\.tar, sample \? \(row 2\): .*opened \(No such"
    ):
        shards.image_bytes(2)
    (folder / "tiny-000000.tar").mkdir()
    with pytest.raises(UserError, match=r"tiny-000000\.tar: not a file; restore"):
        shards.sample(2)


def test_a_shard_that_shrinks_is_named(build: Build) -> None:
    folder = build()
    shards = ShardSet(folder)
    assert shards.image_bytes(0)
    os.truncate(folder / "tiny-000000.tar", 600)
    with pytest.raises(UserError, match=r"sample \? \(row 1\): .*tiny-000000\.tar: ends inside a sample; restore"):
        shards.image_bytes(1)


def _foreign(folder: Path, tars: Path, **shard: object) -> Path:
    """A second folder that only indexes the tars of the first: its records are lines of records.jsonl."""
    own = ShardSet(tars)
    folder.mkdir()
    index, lines = own.index.copy(), b""
    for row in range(len(own)):
        line = own.sample(row).model_dump_json().encode()
        index["json_offset"][row], index["json_size"][row] = len(lines), len(line)
        index["json_digest"][row] = content_digest(line)
        lines += line + b"\n"
    np.save(folder / "index.npy", index)
    (folder / "records.jsonl").write_bytes(lines)
    manifest = json.loads((tars / "manifest.json").read_text())
    for each in manifest["shards"]:
        each.update({"location": str(tars / each["name"])} | shard)
    manifest["index_sha256"] = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    manifest["records_sha256"] = hashlib.sha256(lines).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_tars_elsewhere_with_records_beside_the_index(build: Build, tmp_path: Path) -> None:
    own = ShardSet(build())
    foreign = ShardSet(_foreign(tmp_path / "foreign", own.path))
    for shards in (foreign, pickle.loads(pickle.dumps(foreign))):
        for row in range(len(own)):
            assert shards.sample(row) == own.sample(row) and shards.image_bytes(row) == own.image_bytes(row)
        assert shards.key(3) == "s003"
    _damage(tmp_path / "foreign" / "records.jsonl", int(foreign.index["json_offset"][4]) + 1)
    with pytest.raises(UserError, match=r"sample s004: the JSON record is damaged .*shards\.index build"):
        foreign.sample(4)
    os.truncate(tmp_path / "foreign" / "records.jsonl", 10)
    with pytest.raises(UserError, match=r"records\.jsonl: ends inside a record"):
        foreign.sample(1)
    with pytest.raises(UserError, match=r"records\.jsonl: ends before the last record"):
        ShardSet(tmp_path / "foreign")
    (tmp_path / "foreign" / "records.jsonl").unlink()
    with pytest.raises(UserError, match=r"records\.jsonl: cannot be opened"):
        ShardSet(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("tiny-000000.tar", "no absolute path"),
        ("../tiny/tiny-000000.tar", "no absolute path"),
        ("pipe:cat /etc/passwd", "scheme pipe: is not read"),
        ("/nowhere/x.tar", "missing shard"),
        ("/dev/zero", "missing shard"),
    ],
)
def test_other_places_of_tars_are_refused(build: Build, tmp_path: Path, location: str, reason: str) -> None:
    folder = _foreign(tmp_path / "foreign", build(), location=location)
    with pytest.raises(UserError, match=reason):
        ShardSet(folder)


def test_the_index_knows_the_digest_of_every_image(build: Build) -> None:
    shards = ShardSet(build())
    rows = shards.rows("test")
    assert shards.index["image_digest"][rows].tolist() == [
        int.from_bytes(hashlib.sha256(shards.image_bytes(row)).digest()[:8], "little") for row in rows.tolist()
    ]


def test_location_is_absolute(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build()
    monkeypatch.chdir(folder.parent)
    shards = ShardSet(folder.name)
    assert shards.location == str(folder) and str(shards.path) == folder.name
    monkeypatch.chdir("/")
    assert shards.image_bytes(0)
    assert ShardSet(f"file://{folder}").location == str(folder)
