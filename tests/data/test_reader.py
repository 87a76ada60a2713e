"""Reading shard sets by index, and refusing what is not one."""

import json
import multiprocessing
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data import reader
from reid_dist.data.reader import ShardSet
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
    assert copy._descriptors == {} and copy.image_bytes(3) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(shards.image_bytes, [3, 3]) == [expected, expected]


def test_few_descriptors_stay_open(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 1)
    shards = ShardSet(build(shard_bytes=4_000))
    keys = [shards.key(row) for row in [0, 21, 0, 21, 10]]
    assert keys == ["s000", "s021", "s000", "s021", "s010"]
    assert len(shards._descriptors) == 1


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


def test_damaged_record_names_the_sample(build: Build) -> None:
    folder = build()
    shards = ShardSet(folder)
    entry = shards.index[2]
    with (folder / "tiny-000000.tar").open("r+b") as file:
        file.seek(int(entry["json_offset"]))
        file.write(b"[")
    with pytest.raises(UserError, match=r"shard tiny-000000\.tar, sample s002: the JSON record is damaged"):
        shards.sample(2)
