"""Locations, and reading shard sets from servers that behave and from servers that do not."""

import hashlib
import io
import json
import multiprocessing
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from reid_dist.data import remote
from reid_dist.data.exclude import read_exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import require_rows

Build = Callable[..., Path]


@dataclass
class Server:
    """A folder behind http, with faults: each request for a file takes the next fault from its list."""

    folder: Path
    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        name = unquote(parts.path).rpartition("/")[2]
        asked = handler.headers.get("Range", "")
        self.requests.append((name, asked, parts.query))
        waiting = self.faults.get(name, [])
        fault = waiting.pop(0) if waiting else ""
        if fault == "hang":
            time.sleep(1)
        if fault.isdigit():
            return self._error(handler, int(fault))
        file = self.folder / name
        if not file.is_file():
            return self._error(handler, 404)
        data, status, extra = file.read_bytes(), 200, {}
        if asked and fault != "ignore range":
            first, last = (int(number) for number in re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            if first >= len(data):
                return self._error(handler, 416)
            extra = {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
            data, status = data[first : last + 1], 206
            if fault == "other range":
                extra = {"Content-Range": f"bytes {first + 1}-{last}/9999999"}
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "long":
            data += b"more"
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "ETag": '"1"', **extra}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return None
        if fault == "cut":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
            return None
        handler.wfile.write(data)
        return None

    def _error(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@pytest.fixture
def server(build: Build) -> Iterator[Server]:
    """The tiny set behind http, without long waits between attempts."""
    folder = build()
    state = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hangs up is none of ours."""

    http = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/bucket/{folder.name}"
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


# Locations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/x", "data/x"),
        (Path("data/x"), "data/x"),
        ("path:data/x", "data/x"),
        ("file:///data/x", "/data/x"),
        ("file:/data/x", "/data/x"),
        ("./a:b", "./a:b"),
        ("$HOME/x", "$HOME/x"),  # a strange name, taken as it is
        ("https://h/x?sig=1", "https://h/x?sig=1"),
        ("HTTP://h/x", "http://h/x"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
    ],
)
def test_locations(text: str | Path, expected: str) -> None:
    assert remote.check_location(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pipe:curl http://h/x", "scheme pipe: is not read"),
        ("pipe:touch /tmp/owned", "scheme pipe: is not read"),
        ("ftp://h/x", "scheme ftp: is not read"),
        ("gs://b/x", "scheme gs: is not read"),
        ("simplecache::https://h/x", "scheme simplecache: is not read"),
        ("https://h/x::file:///etc/passwd", "chains of file systems"),
        ("zip://a::https://h/x", "scheme zip: is not read"),
        ("hf://datasets/x", "scheme hf: is not read"),
        ("python:print(1)", "scheme python: is not read"),
        ("https://h/$HOME/x", "variables are not expanded"),
        ("s3://b/${SECRET}", "variables are not expanded"),
        ("https://h/a b", "no spaces or control"),
        ("https://h/a\nHost: x", "no spaces or control"),
        ("https:/h/x", "not a whole URL"),
        ("https://", "not a whole URL"),
        ("https://h:99999/x", "not a whole URL"),
        ("http://user:s3cret@[fe80/x", "not a whole URL"),
        ("s3:bucket", "not a whole URL"),
        ("file://server/x", "another machine"),
        (Path("https://h/x"), "lost a slash"),
    ],
)
def test_other_locations_are_refused_in_one_line(text: str | Path, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        ShardSet(text)
    assert "\n" not in str(caught.value)


def test_queries_stay_with_requests_and_out_of_messages() -> None:
    folder = "https://user:secret@h:1/a/b/?sig=secret#x"
    assert remote.join_location(folder, "m.json") == "https://user:secret@h:1/a/b/m.json?sig=secret#x"
    assert remote.shown_location(folder) == "https://h:1/a/b/"
    assert remote.shown_location("s3://b/x") == "s3://b/x"
    assert remote.join_location("/a", "x") == "/a/x" and remote.shown_location("/a?b") == "/a?b"


# Reading


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
    assert (far.image_digests(far.rows()) == local.image_digests(local.rows())).all()


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


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "short", "other range", "flip"])
def test_faults_that_pass_are_survived(server: Server, fault: str) -> None:
    local, far = ShardSet(server.folder), ShardSet(server.url)
    server.faults = {shard.name: [fault, *([fault] * 2 if fault != "flip" else [])] for shard in far.manifest.shards}
    assert all(far.image_bytes(row) == local.image_bytes(row) for row in (0, 21))


@pytest.mark.parametrize("fault", ["500", "cut", "short", "other range"])
def test_a_fault_that_stays_is_given_up_with_a_reason(server: Server, fault: str) -> None:
    far = ShardSet(server.url)
    shard = far.manifest.shards[0].name
    server.faults = {shard: [fault] * 100}
    with pytest.raises(UserError, match=r"5 times in a row; check the server") as caught:
        far.image_bytes(0)
    text = str(caught.value)
    assert f"(tiny), shard {shard}, sample " in text and "\n" not in text
    # The reading itself, and once more for the sample's name.
    assert len([name for name, _, _ in server.requests if name == shard]) == 2 * remote.ATTEMPTS


def test_a_server_that_hangs_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(remote, "_clients", {})
    far = ShardSet(server.url)
    server.faults = {far.manifest.shards[0].name: ["hang"]}
    began = time.monotonic()
    assert far.image_bytes(0) == ShardSet(server.folder).image_bytes(0) and time.monotonic() - began < 0.9


def test_flipped_bytes_name_the_sample(server: Server) -> None:
    far = ShardSet(server.url)
    shard = far.manifest.shards[0].name
    server.faults = {shard: ["flip", "flip"]}
    with pytest.raises(UserError, match=rf"shard {shard}, sample s000: the image is damaged .*restore it from a copy"):
        far.image_bytes(0)


@pytest.mark.parametrize(("fault", "reason"), [("ignore range", "ignores byte ranges"), ("long", "sends more than")])
def test_a_server_that_ignores_ranges_is_refused_at_once(server: Server, fault: str, reason: str) -> None:
    far = ShardSet(server.url)
    shard = far.manifest.shards[0].name
    server.faults = {shard: [fault] * 9}
    with pytest.raises(UserError, match=f"{reason}.*copy the set to a local folder"):
        far.image_bytes(0)
    assert len([name for name, _, _ in server.requests if name == shard]) == 2


def test_a_shard_that_vanishes_is_named_and_not_waited_for(server: Server) -> None:
    far = ShardSet(server.url)
    shard = far.manifest.shards[0].name
    (server.folder / shard).unlink()
    with pytest.raises(
        UserError, match=rf"shard {shard}, sample \? \(row 0\): .*{shard}: the file is not there.*restore"
    ):
        far.image_bytes(0)
    (server.folder / shard).write_bytes(b"short")
    with pytest.raises(UserError, match="ends before the bytes that the index names"):
        far.image_bytes(0)


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


def test_no_server() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x/manifest\.json: the connection failed .*5 times"):
        ShardSet("http://127.0.0.1:9/x")


def test_forked_and_spawned_workers_read(server: Server) -> None:
    far = ShardSet(server.url)
    expected = far.image_bytes(3)  # an event loop and a connection that must not travel
    for kind in ("fork", "spawn"):
        with multiprocessing.get_context(kind).Pool(2) as pool:
            assert pool.map(far.image_bytes, [3, 3]) == [expected, expected], kind
    assert far.image_bytes(3) == expected and pickle.loads(pickle.dumps(far)).image_bytes(3) == expected


def test_a_full_disk_is_not_taken_for_a_bad_server(server: Server) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        remote.copy_file(f"{server.url}/tiny-000000.tar", Full(), 10**9)
    assert len(server.requests) == 1


def test_quoted_urls_lose_their_secrets() -> None:
    error = ValueError("GET http://user:s3cret@h/x?sig=s3cret&a=s3cret 'failed'")
    text = remote._text(error)
    assert "s3cret" not in text and text.endswith("'failed'")
    with pytest.raises(UserError, match="the connection failed") as caught:
        ShardSet("http://user:s3cret@127.0.0.1:9/x?sig=s3cret")
    assert "s3cret" not in str(caught.value)


def test_whole_files(server: Server, tmp_path: Path) -> None:
    name = "tiny-000000.tar"
    data, url = (server.folder / name).read_bytes(), f"{server.url}/{name}"
    assert remote.file_size(url) == len(data)
    server.faults = {name: ["500", "cut"]}
    assert remote.read_file(url, len(data)) == data
    server.faults = {name: ["cut"]}
    with (tmp_path / "copy").open("w+b") as file:
        digest = remote.copy_file(url, file, len(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert digest == ShardSet(server.folder).manifest.shards[0].sha256
    with pytest.raises(UserError, match="the cap for such a file"):
        remote.read_file(url, len(data) - 1)
    assert remote.read_range(url, 10, 0) == b""


def test_without_the_extra_the_message_names_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(remote, "_clients", {})
    for package, url in (("aiohttp", server.url), ("s3fs", "s3://bucket/x")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=r"is not installed; pip install 'reid_dist\[remote\]'"):
            ShardSet(url)


# S3


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same server as an S3 endpoint: objects are read with GET and HEAD on /bucket/key."""
    pytest.importorskip("s3fs")
    endpoint = server.url.partition("/bucket")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote, "_clients", {})
    yield server


def test_s3(s3: Server) -> None:
    local, far = ShardSet(s3.folder), ShardSet(f"s3://bucket/{s3.folder.name}")
    shard = far.manifest.shards[0].name
    s3.faults = {shard: ["500", "short", "flip"]}
    assert [far.image_bytes(row) for row in (0, 21)] == [local.image_bytes(row) for row in (0, 21)]
    s3.faults = {shard: ["ignore range"] * 9}
    with pytest.raises(UserError, match="sends more than the byte range"):
        far.image_bytes(0)
    s3.faults = {shard: ["403"] * 9}
    with pytest.raises(UserError, match=r"access denied .*FSSPEC_S3_ANON"):
        far.image_bytes(0)
    (s3.folder / shard).unlink()
    s3.faults = {}
    with pytest.raises(UserError, match=rf"{shard}: the file is not there \(no such object\)"):
        far.image_bytes(0)
