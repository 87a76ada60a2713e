"""Locations, and reading from servers that behave and from servers that do not."""

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data import remote
from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from tests.data.file_server import Server

pytestmark = pytest.mark.usefixtures("no_waits")


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


def test_no_server() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x/manifest\.json: the connection failed .*5 times"):
        ShardSet("http://127.0.0.1:9/x")


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
