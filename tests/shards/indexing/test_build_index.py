"""Tars of other software become readable by index, or are refused with shard, key and remedy."""

import hashlib
import io
import json
import tarfile
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from reid_dist.data.reader import ShardSet
from shards.index import main
from shards.writing.files import file_sha256

Members = list[tuple[str, bytes]]


def _image(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 3, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _facts(number: int, **change: Any) -> bytes:
    facts = {"caption": f"scene {number}", "url": "http://x/é", "key": "0", "status": "success", "exif": "{}"}
    return json.dumps({**facts, "width": 6, "error_message": None, **change}).encode()


def _write(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
    return path


def _pair(number: int, key: str | None = None) -> Members:
    key = key or f"{number:09d}"
    return [(f"{key}.jpg", _image(number)), (f"{key}.txt", b"scene %d" % number), (f"{key}.json", _facts(number))]


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """As img2dataset leaves it: uneven shards, a gap in their numbers, failed rows, files beside the tars."""
    folder = tmp_path / "cc3m"
    for shard, rows in ((0, [0, 2, 3]), (1, [1]), (3, [0, 5])):
        _write(folder / f"{shard:05d}.tar", [each for row in rows for each in _pair(10_000 * shard + row)])
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"x")
    return folder


def _check(folder: Path, numbers: list[int], dataset: str = "cc3m") -> ShardSet:
    shards = ShardSet(folder)
    assert shards.name == dataset and len(shards) == len(numbers)
    for row, number in enumerate(numbers):
        sample = shards.sample(row)
        image = shards.image_bytes(row)
        assert image == _image(number) and sample.captions == [f"scene {number}"]
        assert hashlib.sha256(image).hexdigest() == sample.sha256
        assert (sample.width, sample.height) == Image.open(io.BytesIO(image)).size
        assert shards.identities[shards.index["pid"][row]] == sample.pid
    assert len(set(shards.index["pid"].tolist())) == len(numbers)  # each pair is its own identity
    return shards


DOWNLOADED = [0, 2, 3, 10_001, 30_000, 30_005]


def test_img2dataset_tars(downloaded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(downloaded), "--workers", "1"]) == 0
    assert "6 samples in 3 shards" in capsys.readouterr().out
    shards = _check(downloaded, DOWNLOADED)
    assert [shard.location for shard in shards.manifest.shards] == ["", "", ""]
    for shard in shards.manifest.shards:
        assert shard.sha256 == file_sha256(downloaded / shard.name)
        assert shard.bytes == (downloaded / shard.name).stat().st_size
    assert shards.manifest.records_sha256 == file_sha256(downloaded / "records.jsonl")
    assert shards.manifest.splits["train"].images == 6
    assert not (downloaded / "partial").exists()
    # The tars are still what they were: webdataset reads the same in the same order.
    urls = sorted(str(path) for path in downloaded.glob("*.tar"))
    plain = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["jpg"] for item in plain] == [shards.image_bytes(row) for row in range(6)]


def test_index_apart_and_the_same_with_workers(downloaded: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert main(["build", str(downloaded), "--out", str(out), "--dataset", "web", "--workers", "2"]) == 0
    shards = _check(out, DOWNLOADED, "web")
    assert [shard.location for shard in shards.manifest.shards] == [
        str(downloaded / f"{number:05d}.tar") for number in (0, 1, 3)
    ]
    first = {path.name: file_sha256(path) for path in out.iterdir()}
    assert main(["build", str(downloaded), "--out", str(out), "--dataset", "web", "--workers", "1"]) == 0
    assert {path.name: file_sha256(path) for path in out.iterdir()} == first
    assert not any(path.suffix in (".npy", ".jsonl") for path in downloaded.iterdir())
    assert main(["build", str(downloaded), "--out", str(out), "--dataset", "web", "--split", "val"]) == 0
    assert {ShardSet(out).sample(row).role for row in range(6)} == {"gallery"}


def test_braces_and_single_tars(downloaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(downloaded / "{00000..00001}.tar"), f"file:{downloaded / '00003.tar'}"]
    assert main(["build", *sources, "--out", str(tmp_path / "a")]) == 0
    _check(tmp_path / "a", DOWNLOADED)
    assert main(["build", str(downloaded / "{00000..00003}.tar"), "--out", str(tmp_path / "b")]) == 2
    assert "00002.tar: no such tar (1 in all)" in capsys.readouterr().err


@pytest.fixture
def url(downloaded: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(downloaded)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_remote_tars(url: str, downloaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    sources = [f"{url}/{{00000..00001}}.tar", f"{url}/00003.tar"]
    assert main(["build", *sources, "--workers", "1"]) == 2
    assert "--out: name the folder" in capsys.readouterr().err
    assert main(["build", *sources, "--out", str(out), "--dataset", "cc3m", "--workers", "1"]) == 0
    manifest = ShardSet(out).manifest
    assert [shard.location for shard in manifest.shards] == [f"{url}/{number:05d}.tar" for number in (0, 1, 3)]
    assert [shard.sha256 for shard in manifest.shards] == [
        file_sha256(downloaded / shard.name) for shard in manifest.shards
    ]
    assert main(["build", f"{url}/00009.tar", "--out", str(tmp_path / "b"), "--workers", "1"]) == 2
    assert "00009.tar: the file is not there" in capsys.readouterr().err
    assert main(["build", url, "--out", str(tmp_path / "b")]) == 2
    assert "cannot be listed" in capsys.readouterr().err


def test_open_clip_style(tmp_path: Path) -> None:
    """Other suffixes, folders, keys that begin anew in every tar, members that are not read; .txt goes before .json."""
    folder = tmp_path / "set one"
    first = [("a/1.PNG", _image(1, "PNG")), ("a/1.txt", b" two\nlines \n"), ("a/1.cls", b"5")]
    first += [("2.webp", _image(2, "WEBP")), ("2.txt", b""), ("2.json", _facts(2, caption=" json ")), ("README", b"")]
    second = [("a/1.jpeg", _image(1)), ("a/1.json", b'{"caption": "third"}'), ("a/1.seg.npy", b"5")]
    _write(folder / "x-0.tar", first)
    _write(folder / "x-1.tar", second)
    assert main(["build", str(folder), "--workers", "1"]) == 0
    shards = ShardSet(folder)
    assert shards.name == "set_one"
    assert [shards.sample(row).captions[0] for row in range(3)] == ["two\nlines", "json", "third"]
    assert shards.identities == ["set_one:x-0/2", "set_one:x-0/a/1", "set_one:x-1/a/1"]
    assert shards.manifest.card["ignored_members"] == {"cls": 1, "others": 1, "seg.npy": 1}
    assert [shards.image_bytes(row)[:4] for row in range(3)] == [b"\x89PNG", b"RIFF", b"\xff\xd8\xff\xe0"]


def test_failed_rows_are_left_out(tmp_path: Path) -> None:
    failed = [("2.json", _facts(2, status="failed_to_download", caption=None, error_message="404"))]
    _write(tmp_path / "s" / "0.tar", [*_pair(1, "1"), *failed, *_pair(3, "3")])
    assert main(["build", str(tmp_path / "s"), "--workers", "1"]) == 0
    card = ShardSet(tmp_path / "s").manifest.card
    assert card["failed_rows"] == 1 and card["skipped"] == [] and card["converter"] == "index"


def _bomb() -> bytes:
    png = bytearray(_image(1, "PNG"))
    png[16:24] = (10_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


BAD: list[tuple[Members, str]] = [
    ([("2.jpg", _image(2))], "no caption"),
    ([("2.jpg", _image(2)), ("2.txt", b" \n")], "no caption"),
    ([("2.txt", b"two")], "no image (half a sample)"),
    ([("2.jpg", _image(2)), ("2.png", _image(2, "PNG")), ("2.txt", b"two")], "2 images instead of one"),
    ([("2.jpg", _image(2)), ("2.txt", b"a"), ("2.TXT", b"b")], "two .txt members"),
    ([("2.jpg", _image(2)), ("2.txt", b"\xff\xfe\x00")], ".txt is not UTF-8"),
    ([("2.jpg", _image(2)), ("2.txt", b"a" * 1_000_000)], "a .txt of 1000000 bytes, more than the cap"),
    ([("2.jpg", _image(2)), ("2.txt", b"\x01" * 30_000)], "a record of 18"),
    ([("2.jpg", _image(2)), ("2.json", b"x" * 70_000)], "a .json of 70000 bytes"),
    ([("2.jpg", _image(2)), ("2.json", b"[" * 60_000)], ".json is not of the expected form"),
    ([("2.jpg", _image(2)), ("2.json", b'["a"]')], ".json is not of the expected form"),
    ([("2.jpg", _image(2)), ("2.json", b'{"caption": 5}')], "caption: Input should be a valid string"),
    ([("2.jpg", _image(2)), ("2.json", b'{"caption": ["a"]}')], "caption: Input should be a valid string"),
    ([("2.jpg", _image(2)), ("2.json", b'{"caption": "\\ud800"}')], ".json is not of the expected form"),
    ([("2.jpg", b"text"), ("2.txt", b"two")], "no JPEG, PNG or WebP"),
    ([("2.jpg", b"GIF89a" + bytes(60)), ("2.txt", b"two")], "no JPEG, PNG or WebP"),
    ([("2.jpg", b""), ("2.txt", b"two")], "no JPEG, PNG or WebP"),
    ([("2.jpg", bytes(20_000_001)), ("2.txt", b"two")], "an image of 20000001 bytes"),
    ([("2.png", _bomb()), ("2.txt", b"two")], "an image of 10000 x 10000 pixels"),
    ([(f"{'k' * 250}.jpg", _image(2)), (f"{'k' * 250}.txt", b"two")], "pid: String should have at most 200"),
]


@pytest.mark.parametrize(("members", "message"), BAD)
def test_bad_samples(members: Members, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    tar = _write(folder / "0.tar", [*_pair(1, "1"), *members, *_pair(3, "3")])
    assert main(["build", str(folder), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    key = members[0][0].rpartition(".")[0][:200]
    assert error.startswith(f"error: {tar}: sample {key}: ") and message in error and "--max-bad-fraction" in error
    assert error.count("\n") == 1 and not (folder / "manifest.json").exists()
    # Skipped and counted, but only within the bound.
    assert main(["build", str(folder), "--workers", "1", "--max-bad-fraction", "0.3"]) == 2
    assert "1 of 3 samples cannot be used" in capsys.readouterr().err
    assert main(["build", str(folder), "--workers", "1", "--max-bad-fraction", "0.4"]) == 0
    skipped = _check(folder, [1, 3], "s").manifest.card["skipped"]
    assert len(skipped) == 1 and skipped[0].startswith(f"0.tar: sample {key}: ")
    # Without the bound the same set is refused again.
    assert main(["build", str(folder), "--workers", "1"]) == 2


HOSTILE: list[tuple[Members, str]] = [
    (
        [("2.jpg", _image(2)), ("2.json", _facts(2)), *_pair(3, "3"), ("2.txt", b"two")],
        "sample 2: its members do not stand together",
    ),
    ([("1.jpg", _image(2)), ("1.txt", b"two")], "1.jpg: occurs twice"),
    ([("1.webp", _image(2, "WEBP"))], "1: its members do not stand together, or the key occurs twice"),
    ([("2.pyd", b"cos\nsystem\n(S'x'\ntR.")], "2.pyd is code"),
    ([("../2.jpg", _image(2)), ("../2.txt", b"two")], "no name of a file below"),
    ([("/abs/2.jpg", _image(2)), ("/abs/2.txt", b"two")], "no name of a file below"),
]


@pytest.mark.parametrize(("members", "message"), HOSTILE)
@pytest.mark.parametrize("bound", ["0", "0.9"])
def test_hostile_tars(
    members: Members, message: str, bound: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What may hide other samples or do harm is never skipped."""
    first = [*_pair(0, "0"), *_pair(1, "1"), *_pair(9, "9")]
    tar = _write(tmp_path / "s" / "0.tar", [*first, *members])
    assert main(["build", str(tmp_path / "s"), "--workers", "1", "--max-bad-fraction", bound]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tar}: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_interleaved_members_are_no_half_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """webdataset makes four half samples of these without a word."""
    members = [("1.jpg", _image(1)), ("2.jpg", _image(2)), ("1.txt", b"one"), ("2.txt", b"two")]
    tar = _write(tmp_path / "s" / "0.tar", members)
    assert main(["build", str(tmp_path / "s"), "--workers", "1"]) == 2
    assert f"{tar}: sample 1: no caption in a .txt or .json right beside" in capsys.readouterr().err
    assert main(["build", str(tmp_path / "s"), "--workers", "1", "--max-bad-fraction", "0.99"]) == 2
    assert f"{tar}: sample 1: its members do not stand together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat /etc/passwd", "scheme pipe: is not read"),
        ("gs://bucket/{0..3}.tar", "scheme gs: is not read"),
        ("http://x/a::b.tar", "chains of file systems"),
        ("/nowhere", "no folder and no .tar"),
        ("/nowhere/0.tar", "no such tar"),
        ("/nowhere/{a,b}.tar", "braces hold a range of numbers"),
        ("/nowhere/{0..999999999}.tar", "stands for 1000000000 tars"),
        ("/nowhere/{0..9999}{0..9999}.tar", "stands for 100000000 tars"),
        ("", "holds no .tar"),
    ],
)
def test_wrong_sources(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["build", source or str(tmp_path / "empty"), "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sets_of_ours_and_equal_names_are_refused(
    downloaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "b" / "00000.tar", _pair(1))
    assert main(["build", str(downloaded), str(tmp_path / "b"), "--out", str(tmp_path / "a")]) == 2
    assert "a second tar named 00000.tar" in capsys.readouterr().err
    (tmp_path / "b" / "index.npy").write_bytes(b"x")
    assert main(["build", str(tmp_path / "b")]) == 2
    assert "another index" in capsys.readouterr().err
    (tmp_path / "b" / "build.json").write_text("{}")
    assert main(["build", str(tmp_path / "b")]) == 2
    assert "a set of python -m shards.write" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", "records.jsonl", "partial/notes.txt", "partial"])
def test_files_of_other_programs_are_left_alone(
    name: str, downloaded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = downloaded / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text('{"shards": []}')
    assert main(["build", str(downloaded), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert str(downloaded / name.split("/")[0]) in error and "choose another --out" in error and error.count("\n") == 1
    assert theirs.read_text() == '{"shards": []}' and not (downloaded / "index.npy").exists()


def test_interrupted_call_continues(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(downloaded), "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    expected = {path.name: file_sha256(path) for path in (tmp_path / "whole").iterdir()}
    out = tmp_path / "a"
    good = (downloaded / "00001.tar").read_bytes()
    (downloaded / "00001.tar").write_bytes(good[:1500])
    arguments = ["build", str(downloaded), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 2
    assert "00001.tar: ends after 1500 bytes" in capsys.readouterr().err
    assert not (out / "manifest.json").exists() and (out / "partial" / "00000.tar.json").exists()
    (downloaded / "00001.tar").write_bytes(good)
    read: list[str] = []
    import shards.indexing.build_index as module

    original = module.index_tar

    def counted(job: Any, progress: Any) -> Any:
        read.append(job.name)
        return original(job, progress)

    monkeypatch.setattr(module, "index_tar", counted)
    assert main(arguments) == 0
    assert read == ["00001.tar", "00003.tar"]
    assert {path.name: file_sha256(path) for path in out.iterdir()} == expected
