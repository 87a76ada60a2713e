"""Shard sets behind URLs: they read as local ones, and what they name is not trusted."""

import hashlib
import json
import multiprocessing
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.exclude import read_exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import require_rows
from tests.data.file_server import Server

pytestmark = pytest.mark.usefixtures("no_waits")


def test_a_remote_set_reads_as_the_local_one(server: Server) -> None:
    local, far = ShardSet(server.folder), ShardSet(server.url)
    assert [name for name, _, _ in server.requests] == ["manifest.json", "index.npy"]
    assert far.location == server.url and len(far) == len(local)
    for row in range(len(local)):
        assert far.image_bytes(row) == local.image_bytes(row)
        assert far.sample(row) == local.sample(row) and far.key(row) == local.key(row)
    ranges = [asked for name, asked, _ in server.requests if name.endswith(".tar")]
    entry = local.index[0]
    first, size = int(entry["image_offset"]), int(entry["image_size"])
    assert ranges[0] == f"bytes={first}-{first + size - 1}" and all(ranges)  # never a whole tar
    assert (far.index == local.index).all()


def test_a_token_in_the_query_goes_to_every_request_and_into_no_message(server: Server) -> None:
    far = ShardSet(f"{server.url}/?sig=s3cret%2F%2B%3D")  # a signature is sent as it is written
    server.faults = {far.manifest.shards[0].name: ["403"]}
    with pytest.raises(UserError, match=r"access denied \(status 403\).*when that expires") as caught:
        far.image_bytes(0)
    assert {query for _, _, query in server.requests} == {"sig=s3cret%2F%2B%3D"}
    assert "s3cret" not in str(caught.value)
    for wrong in (lambda: TrainingSamples([far, far], (8, 4)), lambda: require_rows(far, "val")):
        with pytest.raises(UserError) as caught:
            wrong()
        assert f"{server.url}/" in str(caught.value) and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "index.npy"])
@pytest.mark.parametrize(("fault", "reason"), [("404", "not there"), ("flip", "sha256|not a valid manifest")])
def test_side_files_are_checked_at_opening(server: Server, name: str, fault: str, reason: str) -> None:
    server.faults = {name: [fault] * 9}
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*({reason})"):
        ShardSet(server.url)


def _edit(folder: Path, **shard: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0].update(shard)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_remote_manifest_cannot_point_at_local_files(server: Server) -> None:
    _edit(server.folder, location="/etc/passwd")
    with pytest.raises(UserError, match=r"lies at /etc/passwd, which is no URL"):
        ShardSet(server.url)


def test_a_remote_list_cannot_point_at_local_tars(server: Server, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(bytes(1024))
    for line in (str(tmp_path / "00000.tar"), f"file://{tmp_path}/00000.tar"):
        (server.folder / "tars.txt").write_text(f"00000.tar\n{line}\n")
        with pytest.raises(UserError, match=r"tars\.txt: names local files"):
            StreamSource(f"{server.url}/tars.txt")


def test_an_exclusion_list_beside_remote_sets(server: Server) -> None:
    (server.folder / "exclude.txt").write_text("# asked to be left out\ntiny:1\n")
    assert read_exclusions(f"{server.url}/exclude.txt").pids == {"tiny:1"}
    with pytest.raises(UserError, match=r"none\.txt: the file is not there"):
        read_exclusions(f"{server.url}/none.txt")


def test_tars_behind_urls_indexed_here(server: Server, tmp_path: Path) -> None:
    local = ShardSet(server.folder)
    for name in ("manifest.json", "index.npy"):
        (tmp_path / name).write_bytes((server.folder / name).read_bytes())
    for number, shard in enumerate(local.manifest.shards):
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["shards"][number]["location"] = f"{server.url}/{shard.name}?sig=s3cret"
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    mixed = ShardSet(tmp_path)
    assert not server.requests  # opened without asking
    assert [mixed.image_bytes(row) for row in (0, 21)] == [local.image_bytes(row) for row in (0, 21)]
    assert {query for _, _, query in server.requests} == {"sig=s3cret"}


def test_records_of_a_remote_set_are_fetched_once_and_verified(server: Server) -> None:
    local = ShardSet(server.folder)
    index, lines = local.index.copy(), b""
    for row in range(len(local)):
        line = local.sample(row).model_dump_json().encode()
        index["json_offset"][row], index["json_size"][row] = len(lines), len(line)
        lines += line + b"\n"
    np.save(server.folder / "index.npy", index)
    (server.folder / "records.jsonl").write_bytes(lines)
    manifest = json.loads((server.folder / "manifest.json").read_text())
    manifest |= {"index_sha256": "", "records_sha256": hashlib.sha256(lines).hexdigest()}
    (server.folder / "manifest.json").write_text(json.dumps(manifest))
    server.faults = {"records.jsonl": ["500", "cut"]}
    far = ShardSet(server.url)
    samples = [local.sample(row) for row in range(len(local))]
    assert [far.sample(row) for row in range(len(far))] == samples
    assert sum(name == "records.jsonl" for name, _, _ in server.requests) == 3
    assert pickle.loads(pickle.dumps(far)).sample(4) == samples[4]
    server.faults = {"records.jsonl": ["flip"]}
    with pytest.raises(UserError, match=r"records\.jsonl: its sha256 is not the one"):
        ShardSet(server.url)
    (server.folder / "records.jsonl").write_bytes(lines + lines)
    with pytest.raises(UserError, match=r"records\.jsonl: more than \d+ bytes"):
        ShardSet(server.url)


def test_side_files_have_caps(server: Server) -> None:
    with (server.folder / "index.npy").open("ab") as file:
        file.write(bytes(100_000))
    with pytest.raises(UserError, match=r"index\.npy: more than \d+ bytes, the cap"):
        ShardSet(server.url)


def test_forked_and_spawned_workers_read(server: Server) -> None:
    far = ShardSet(server.url)
    expected = far.image_bytes(3)  # an event loop and a connection that must not travel
    for kind in ("fork", "spawn"):
        with multiprocessing.get_context(kind).Pool(2) as pool:
            assert pool.map(far.image_bytes, [3, 3]) == [expected, expected], kind
    assert far.image_bytes(3) == expected and pickle.loads(pickle.dumps(far)).image_bytes(3) == expected
