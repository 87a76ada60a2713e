"""LUPerson: folders and the LMDB, with and without labels; nothing is unpickled."""

import io
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

from reid_dist.errors import UserError
from shards import luperson
from shards.raw import Counts, RawSample, count_parts

_MARK = Path(tempfile.gettempdir()) / f"unpickled-{os.getpid()}"
FILES = ["video1/0007/000.jpg", "video1/0007/001.jpg", "video2/0007/000.jpg"]


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    for number, name in enumerate(FILES):
        draw_at(tmp_path / "images" / name, number)
    (tmp_path / "images" / "video1" / "Thumbs.db").write_bytes(b"x")
    draw_at(tmp_path / "images" / ".trash" / "old.jpg", 9)
    return tmp_path / "images"


def _samples(root: Path, variant: str) -> list[RawSample]:
    return list(luperson.samples(root, variant))


def _lmdb(folder: Path, values: dict[bytes, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    folder.mkdir()
    environment = lmdb.open(str(folder), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()
    return folder


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_folders_without_and_with_labels(root: Path) -> None:
    plain = _samples(root, "folder")
    assert [(s.source, s.pid, s.camid, s.split, s.role) for s in plain] == [
        (name, None, -1, "train", "train") for name in FILES
    ]
    assert count_parts(plain, luperson) == {"train": Counts(3, 3, 0, 0)}
    noisy = _samples(root, "folder_nl")
    assert [s.pid for s in noisy] == ["video1/0007", "video1/0007", "video2/0007"]
    assert count_parts(noisy, luperson) == {"train": Counts(2, 3, 0, 0)}


def test_an_image_without_a_folder_has_no_label(root: Path, draw_at: Callable[[Path, int], None]) -> None:
    draw_at(root / "alone.jpg", 3)
    assert len(_samples(root, "folder")) == 4
    with pytest.raises(UserError, match=r"alone\.jpg: no folder that could be its identity; use the variant without"):
        _samples(root, "folder_nl")


def test_lmdb_without_and_with_labels(root: Path) -> None:
    values = {name.encode(): (root / name).read_bytes() for name in FILES} | {b"z/\xc3\xa9.png": _png()}
    folder = _lmdb(root.parent / "lmdb", {**values, b"__len__": pickle.dumps(3), b"__keys__": pickle.dumps(FILES)})
    plain = _samples(root.parent, "lmdb")
    assert [(s.source, s.pid) for s in plain] == [(key.decode(), None) for key in sorted(values)]
    assert [s.image.read() for s in plain] == [values[key] for key in sorted(values)]
    assert [s.image.size for s in plain] == [len(values[key]) for key in sorted(values)]
    assert plain[0].image.name == f"{folder}: {FILES[0]}"
    assert [s.pid for s in _samples(folder, "lmdb_nl")] == ["video1/0007", "video1/0007", "video2/0007", "z"]
    assert sorted(path.name for path in folder.iterdir()) == ["data.mdb", "lock.mdb"]


def test_labels_from_a_table(tmp_path: Path) -> None:
    _lmdb(tmp_path / "lmdb", {b"a": _png(), b"b": _png(), b"c": _png()})
    with pytest.raises(UserError, match=r"a: no folder that could be its identity; .*keys\.tsv"):
        _samples(tmp_path, "lmdb_nl")
    table = tmp_path / "keys.tsv"
    table.write_text("a\t17\nb\t4\nc\t17\nunused\t1\n")
    assert [s.pid for s in _samples(tmp_path, "lmdb_nl")] == ["17", "4", "17"]
    table.write_text("a\t17\nb\t4\n")
    with pytest.raises(UserError, match=r"lmdb: c: not in keys\.tsv; add its line"):
        _samples(tmp_path, "lmdb_nl")
    for line in ("b", "b\t", "\t4", "b\t4\t5", ""):
        table.write_text(f"a\t17\n{line}\n")
        with pytest.raises(UserError, match=r"keys\.tsv: line 2: not a key, a tab and an identity"):
            _samples(tmp_path, "lmdb_nl")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {_MARK}",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (pickle.dumps(_Bomb()), "is a pickle, which is never loaded"),
        (pickle.dumps((b"\xff\xd8\xff", 7)), "is a pickle, which is never loaded"),
        (b"", "is neither JPEG nor PNG"),
        (b"GIF89a", "is neither JPEG nor PNG"),
    ],
)
@pytest.mark.parametrize("variant", ["lmdb", "lmdb_nl"])
def test_values_that_are_no_image_files(tmp_path: Path, value: bytes, message: str, variant: str) -> None:
    _lmdb(tmp_path / "lmdb", {b"a/0.png": _png(), b"a/1.png": value})
    with pytest.raises(UserError, match=rf"lmdb: a/1\.png: the value {message}; write the LMDB"):
        _samples(tmp_path, variant)
    assert not _MARK.exists()


@pytest.mark.parametrize("key", [b"\xff\xfe", b"a\n.jpg", b"\x00\x00\x00\x01", b"  "])
def test_keys_that_are_no_text(tmp_path: Path, key: bytes) -> None:
    _lmdb(tmp_path / "lmdb", {key: _png()})
    with pytest.raises(UserError, match=r"lmdb: the key b.* is no text"):
        _samples(tmp_path, "lmdb")


def test_what_is_no_lmdb(tmp_path: Path, root: Path) -> None:
    pytest.importorskip("lmdb")
    with pytest.raises(UserError, match=r"lmdb: holds no data\.mdb"):
        _samples(root, "lmdb")
    with pytest.raises(UserError, match=r"lmdb: missing; .*use the variant lmdb"):
        _samples(tmp_path / "lmdb", "folder")
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be opened as an LMDB"):
        _samples(tmp_path, "lmdb")
    with pytest.raises(UserError, match=r"lmdb: holds no images; .*use the variant lmdb"):
        _samples(tmp_path / "lmdb", "folder")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lmdb(tmp_path / "lmdb", {b"a": _png()})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"pip install 'reid_dist\[lmdb\]'"):
        _samples(tmp_path, "lmdb")


def _read(sample: RawSample) -> bytes:
    return sample.image.read()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_images_are_read_in_workers(tmp_path: Path, start: str) -> None:
    _lmdb(tmp_path / "lmdb", {b"a": _png(), b"b": _png() + b"tail"})
    samples = _samples(tmp_path, "lmdb")
    here = [_read(sample) for sample in samples]
    with get_context(start).Pool(2) as pool:
        assert pool.map(_read, samples) == here == [_png(), _png() + b"tail"]
