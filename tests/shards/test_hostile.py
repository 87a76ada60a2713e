"""Hostile and broken input for everything below shards/: nothing runs, nothing is lost without a word."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import MANIFEST_NAME
from shards.index import main as index_main
from shards.verify import main as verify_main
from shards.write import main as write_main
from tests.hostile_tars import BAD_TARS, KEY, Bad, bad_tar, gzipped, join, jpeg, member, pairs, payload, png_bomb


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must refuse its input with one line on stderr, and leave nothing that looks whole."""

    def run(main: Callable[[list[str]], int], arguments: list[str], *names: str, out: Path | None = None) -> str:
        capsys.readouterr()
        code = main(arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1, (code, lines)
        for name in names:
            assert name in lines[0], (name, lines[0])
        # What and what to do about it.
        assert "; " in lines[0] and len(lines[0]) < 1000
        assert out is None or not (out / MANIFEST_NAME).exists()
        return lines[0]

    return run


@pytest.mark.parametrize("bad", BAD_TARS.values(), ids=BAD_TARS)
def test_index_build_refuses_bad_tars(bad: Bad, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder, mark = tmp_path / "pairs", tmp_path / "executed"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(join(pairs(2, "img2dataset")))
    (folder / "00001.tar").write_bytes(bad_tar(bad, mark))
    refused(index_main, ["build", str(folder), "--workers", "1"], "00001.tar", bad.names, out=folder)
    assert not mark.exists()
    assert not list(tmp_path.rglob("*.partial")), "a temporary file was left"


@pytest.mark.parametrize("name", ["img2dataset", "wit"])
@pytest.mark.parametrize("bad", BAD_TARS.values(), ids=BAD_TARS)
def test_converters_refuse_bad_tars(name: str, bad: Bad, tmp_path: Path, refused: Callable[..., str]) -> None:
    root, out, mark = tmp_path / "pairs", tmp_path / "out", tmp_path / "executed"
    root.mkdir()
    (root / "00001.tar").write_bytes(bad_tar(bad, mark))
    arguments = [name, "--root", str(root), "--out", str(out), "--workers", "1"]
    if bad is BAD_TARS["interleaved"]:
        # Converters join members by key wherever they stand, so nothing is lost.
        assert write_main(arguments) == 0 and len(ShardSet(out)) == 6
        return
    refused(write_main, arguments, "00001.tar", bad.names, out=out)
    assert not mark.exists()


def test_bad_samples_are_skipped_and_counted_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad sample goes, is named and counted; a broken or hostile tar still ends the indexing."""
    skippable = {
        *("image without text", "text without image", "two images", "pickle as an image", "100 megapixels"),
        *("no image", "caption not UTF-8", "caption of 1 MB", "empty caption", "json not UTF-8"),
        *("json with a number", "json with a list", "json is a list", "json cut", "json very deep", "json of 1 MB"),
    }
    for number, (name, bad) in enumerate(BAD_TARS.items()):
        folder, mark = tmp_path / str(number), tmp_path / "executed"
        folder.mkdir()
        (folder / "00001.tar").write_bytes(bad_tar(bad, mark))
        capsys.readouterr()
        code = index_main(["build", str(folder), "--workers", "1", "--max-bad-fraction", "0.5"])
        captured = capsys.readouterr()
        assert not mark.exists() and code == (0 if name in skippable else 2), (name, captured.err)
        if code == 0:
            shards = ShardSet(folder)
            assert len(shards) == 4 and len(shards.manifest.card["skipped"]) == 1, name
            assert KEY in shards.manifest.card["skipped"][0] and f"sample {KEY}" in captured.err
            assert verify_main([str(folder), "--vocabulary", os.devnull]) == 0, name


ENTRIES = [("a/0.jpg", "a man", 1), ("a/1.jpg", "a woman", 2), ("a/2.jpg", "a child", 3)]


def _write_cuhk(root: Path, entries: list[tuple[Any, Any, Any]]) -> Path:
    facts = [
        {"split": "train", "captions": [caption], "file_path": path, "processed_tokens": [[]], "id": pid}
        for path, caption, pid in entries
    ]
    (root / "reid_raw.json").write_text(json.dumps(facts))
    return root / "imgs"


def _write_jsonl(root: Path, entries: list[tuple[Any, Any, Any]]) -> Path:
    lines = [json.dumps({"path": path, "caption": caption, "pid": pid}) for path, caption, pid in entries]
    (root / "all.jsonl").write_text("\n".join(lines))
    return root


def _write_rstp(root: Path, entries: list[tuple[Any, Any, Any]]) -> Path:
    facts = [
        {"id": pid, "img_path": path, "captions": [caption, "another"], "split": "train"}
        for path, caption, pid in entries
    ]
    (root / "data_captions.json").write_text(json.dumps(facts))
    return root / "imgs"


ANNOTATED: dict[str, Callable[[Path, list[tuple[Any, Any, Any]]], Path]] = {
    "cuhk_pedes": _write_cuhk,
    "jsonl": _write_jsonl,
    "rstp_reid": _write_rstp,
}
ENTRY: dict[str, tuple[Any, Any, Any]] = {
    "parent folder": ("../secret.jpg", "a man", 4),
    "hidden parent folder": ("a/../../secret.jpg", "a man", 4),
    "absolute": ("/etc/passwd", "a man", 4),
    "backslash": ("a\\..\\secret.jpg", "a man", 4),
    "null": ("a/0.jpg\0.png", "a man", 4),
    "URL": ("http://localhost/0.jpg", "a man", 4),
    "pipe": ("pipe:touch executed", "a man", 4),
    "missing": ("a/9.jpg", "a man", 4),
    "folder": ("a", "a man", 4),
    "no path": (None, "a man", 4),
    "path is a list": (["a/0.jpg"], "a man", 4),
    "caption is a number": ("a/3.jpg", 7, 4),
    "caption is an object": ("a/3.jpg", {"text": "a"}, 4),
    "identity is a list": ("a/3.jpg", "a man", [4]),
    "identity is a fraction": ("a/3.jpg", "a man", 4.5),
    "caption of 1 MB": ("a/3.jpg", "long " * 200_000, 4),
    "lone surrogate": ("a/3.jpg", "a \ud800 man", 4),
}


@pytest.mark.parametrize("name", ANNOTATED)
@pytest.mark.parametrize("entry", ENTRY.values(), ids=ENTRY)
def test_annotations(
    name: str, entry: tuple[Any, Any, Any], tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an annotation may hold; files outside the tree are there to be found."""
    root, out = tmp_path / "raw", tmp_path / "out"
    root.mkdir()
    images = ANNOTATED[name](root, [*ENTRIES, entry])
    for number in range(4):
        path = images / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    for folder in (root, images, tmp_path):
        (folder / "secret.jpg").write_bytes(jpeg(9))
    monkeypatch.chdir(tmp_path)
    arguments = [name, "--root", str(root), "--out", str(out), "--workers", "1", "--allow-mismatch"]
    line = refused(write_main, arguments, out=out)
    assert str(root) in line or "a/3.jpg" in line
    assert not (tmp_path / "executed").exists()


def test_annotations_that_are_not_utf8(tmp_path: Path, refused: Callable[..., str]) -> None:
    for name, file in {"cuhk_pedes": "reid_raw.json", "jsonl": "all.jsonl", "rstp_reid": "data_captions.json"}.items():
        root = tmp_path / name
        root.mkdir()
        ANNOTATED[name](root, ENTRIES)
        (root / file).write_bytes((root / file).read_bytes().replace(b"a woman", b"a caf\xe9"))
        refused(write_main, [name, "--root", str(root), "--out", str(tmp_path / "out")], str(root / file))


IMAGES: dict[str, Callable[[Path], bytes]] = {
    "truncated": lambda mark: jpeg(3)[:-60],
    "cut in the head": lambda mark: jpeg(3)[:30],
    "empty": lambda mark: b"",
    "a page": lambda mark: b"<html>not found</html>",
    "100 megapixels": lambda mark: png_bomb(),
    "pickle": payload,
    "21 MB": lambda mark: jpeg(3) + bytes(21_000_000),
}


@pytest.mark.parametrize("name", ["cuhk_pedes", "jsonl", "folder", "img2dataset"])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_images(name: str, image: Callable[[Path], bytes], tmp_path: Path, refused: Callable[..., str]) -> None:
    root, out, mark = tmp_path / "raw", tmp_path / "out", tmp_path / "executed"
    root.mkdir()
    images = ANNOTATED[name](root, ENTRIES) if name in ANNOTATED else root
    (images / "a").mkdir(parents=True)
    for number in range(3):
        (images / "a" / f"{number}.jpg").write_bytes(jpeg(number) if number != 1 else image(mark))
        (images / "a" / f"{number}.txt").write_text("a caption")
    arguments = [name, "--root", str(root), "--out", str(out), "--workers", "1", "--allow-mismatch"]
    refused(write_main, arguments, str(images / "a" / "1.jpg"), out=out)
    # Left out on request: counted, the rest is whole.
    shutil.rmtree(out, ignore_errors=True)
    assert write_main([*arguments, "--max-bad-fraction", "0.5"]) == 0
    assert len(ShardSet(out)) == 2 and not mark.exists()
    assert verify_main([str(out), "--vocabulary", os.devnull]) == 0


@pytest.mark.parametrize(
    "location", ["pipe:touch executed", "pipe:touch executed #.tar", "file://host/x.tar", "ftp://host/x.tar", "gs://x"]
)
def test_other_schemes_are_refused(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", "x=pipe:touch executed")
    refused(index_main, ["build", location, "--out", "out"])
    refused(verify_main, [location])
    refused(verify_main, ["--overlap", location, location])
    refused(write_main, ["img2dataset", "--root", location, "--out", "out"])
    assert not (tmp_path / "executed").exists()


def test_tars_that_change_after_indexing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A foreign set: what was good when it was indexed is checked against that for ever."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    path = folder / "00000.tar"
    good = join(pairs(5, "img2dataset"))
    path.write_bytes(good)
    assert index_main(["build", str(folder), "--workers", "1"]) == 0
    arguments = [str(folder), "--vocabulary", os.devnull]
    assert verify_main(arguments) == 0
    image = jpeg(3)
    place = good.index(image) + len(image) // 2
    changes = {
        "sample 000000003: the image is not the one of the index": good[:place] + b"\0" + good[place + 1 :],
        "truncated": good[:place],
        "its sha256 is not the one in the manifest": good[:-9] + b"x" * 9,
        "is gzip": gzipped(good),
        "'x.jpg' is a symbolic link": good[:-1024] + member("x.jpg", kind=b"2", link="/etc/passwd") + bytes(1024),
    }
    for what, data in changes.items():
        path.write_bytes(data)
        capsys.readouterr()
        assert verify_main(arguments) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if "DAMAGE" in line]
        assert any(what in line for line in lines), (what, lines)
        assert all("00000.tar" in line and "`python -m shards.index build" in line for line in lines)
    path.unlink()
    assert verify_main(arguments) == 1
    assert "cannot be read (No such file or directory)" in capsys.readouterr().out
    path.write_bytes(good)
    records = folder / "records.jsonl"
    records.write_bytes(records.read_bytes().replace(b"picture 3", b"picture 4"))
    assert verify_main(arguments) == 1
    printed = capsys.readouterr().out
    assert "records.jsonl: its sha256 is not" in printed and "sample 000000003: the record is not the one" in printed


def test_tars_behind_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served, folder = tmp_path / "served", tmp_path / "index"
    served.mkdir()
    good = join(pairs(5, "img2dataset"))
    (served / "00000.tar").write_bytes(good)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{{00000..00000}}.tar"
        assert index_main(["build", url, "--out", str(folder), "--workers", "1"]) == 0
        arguments = [str(folder), "--vocabulary", os.devnull]
        assert verify_main(arguments) == 0
        image = jpeg(3)
        place = good.index(image) + len(image) // 2
        (served / "00000.tar").write_bytes(good[:place] + b"\0" + good[place + 1 :])
        assert verify_main(arguments) == 1
        assert "sample 000000003: the image is not the one of the index" in capsys.readouterr().out
        (served / "00000.tar").write_bytes(good + good)
        assert verify_main(arguments) == 1
        assert f"more than {len(good)} bytes" in capsys.readouterr().out
        (served / "00000.tar").unlink()
        assert verify_main(arguments) == 1
        assert "the file is not there (status 404)" in capsys.readouterr().out
    finally:
        server.shutdown()
        server.server_close()
