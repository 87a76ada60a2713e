"""Image-text pairs in img2dataset's layout: folders and tars."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import img2dataset
from shards.raw import RawSample, TarImage


def read(root: Path) -> list[RawSample]:
    return list(img2dataset.samples(root, "standard"))


def pack(path: Path, members: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def pack_folders(pairs: Path, root: Path) -> None:
    """The same pairs as img2dataset writes them to tars: one for each folder."""
    for folder in sorted(path for path in pairs.iterdir() if path.is_dir()):
        pack(root / f"{folder.name}.tar", {path.name: path.read_bytes() for path in sorted(folder.iterdir())})


def test_samples(pairs: Path) -> None:
    samples = read(pairs)
    assert [(sample.source, sample.captions) for sample in samples] == [
        ("00000/000000000.jpg", ("scene 0",)),
        ("00000/000000002.jpg", ("scene 1",)),  # from the .json
        ("00001/000010000.jpg", ("scene 2",)),
    ]
    assert {(sample.pid, sample.split, sample.role, sample.camid) for sample in samples} == {
        (None, "train", "train", -1)
    }


def test_tars_give_the_samples_of_folders(pairs: Path, tmp_path: Path) -> None:
    pack_folders(pairs, tmp_path / "tars")
    (tmp_path / "tars" / "00000_stats.json").write_text("{}")
    (tmp_path / "tars" / "00000.parquet").write_bytes(b"x")
    folders, tars = read(pairs), read(tmp_path / "tars")
    assert [(s.source, s.captions) for s in tars] == [(s.source, s.captions) for s in folders]
    assert [sample.image.read() for sample in tars] == [sample.image.read() for sample in folders]
    assert all(isinstance(sample.image, TarImage) and sample.image.group == "" for sample in tars)
    assert [sample.image.size for sample in tars] == [sample.image.size for sample in folders]


def test_folders_and_tars_together(pairs: Path) -> None:
    image = next((pairs / "00000").glob("*.jpg")).read_bytes()
    pack(pairs / "more" / "00009.tar", {"000090000.png": image, "000090000.txt": b"one more"})
    assert read(pairs)[0].source == "more/00009/000090000.png"
    assert len(read(pairs)) == 4


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_of_a_tar(tmp_path: Path, kind: int) -> None:
    long = "a" * 90 + "/" + "b" * 95
    members = {
        "1.jpg": b"one",
        "2.jpg": b"two",
        "1.txt": b"first\n",  # not beside its image: found all the same
        "2.json": b'{"caption": "second", "status": "success"}',
        "3.json": b'{"status": "failed_to_download", "caption": null}',
        "4.jpg": b"four",
        "4.json": b'{"status": "failed_to_resize", "caption": "x"}',
        "5.cls": b"7",  # of other programs
        "d.v1/img.01.jpg": b"dots",
        "d.v1/img.01.txt": b"all dots",
        f"{long}.WEBP": b"five",
        f"{long}.txt": "fünf".encode(),
        "notes": b"x",
    }
    pack(tmp_path / "0.tar", members, kind)
    samples = read(tmp_path)
    assert [(sample.source, sample.captions, sample.image.read()) for sample in samples] == [
        ("0/1.jpg", ("first",), b"one"),
        ("0/2.jpg", ("second",), b"two"),
        ("0/d.v1/img.01.jpg", ("all dots",), b"dots"),
        (f"0/{long}.webp", ("fünf",), b"five"),
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"x"}, r"0\.tar: 1: no caption"),
        ({"1.jpg": b"x", "2.txt": b"a", "1.txt": b"b"}, r"0\.tar: 2: holds no image"),
        ({"1.jpg": b"x", "1.png": b"y", "1.txt": b"a"}, r"0\.tar: 1\.png: a second image of its key"),
        ({"1.cls": b"x", "2.npy": b"y"}, r"0\.tar: holds no images and captions \('2\.npy' and such\)"),
        ({"1.jpg": b"x", "1.txt": b"\xff\xfe"}, r"0\.tar: 1\.txt: not UTF-8"),
        ({"1.jpg": b"x", "1.txt": b"a" * 70_000}, r"0\.tar: 1\.txt: more than 65536 bytes"),
        ({"1.jpg": b"x", "1.json": b'{"caption": 5}'}, r"0\.tar: 1\.json: not JSON of img2dataset"),
        ({"../1.jpg": b"x", "1.txt": b"a"}, r"0\.tar: .*\.\./1\.jpg"),
        ({"/1.jpg": b"x", "1.txt": b"a"}, r"0\.tar: .*/1\.jpg"),
        ({"1.jpg": b"x", "1.txt": b"a", "1.pkl": b"cos\nsystem\n."}, r"0\.tar: .*1\.pkl"),
    ],
)
def test_hostile_or_broken_tars(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    pack(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_tar(pairs: Path, tmp_path: Path) -> None:
    pack_folders(pairs, tmp_path / "tars")
    path = tmp_path / "tars" / "00000.tar"
    whole = path.read_bytes()
    for size in (100, 512 + 10, len(whole) // 2 // 512 * 512):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"00000\.tar"):
            read(tmp_path / "tars")


def test_missing_caption(pairs: Path) -> None:
    (pairs / "00000/000000000.txt").write_text("  \n")
    (pairs / "00000/000000000.json").unlink()
    with pytest.raises(UserError, match=r"000000000\.jpg: no caption"):
        read(pairs)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".json", b"{", "not JSON of img2dataset"),
        (".json", b'{"caption": 5}', "not JSON of img2dataset"),
        (".json", b'{"x": "' + bytes(70_000) + b'"}', "more than 65536 bytes"),
        (".txt", b"\xff\xfe", "not UTF-8"),
        (".txt", b"a" * 70_000, "more than 65536 bytes"),
    ],
)
def test_hostile_neighbours(pairs: Path, suffix: str, content: bytes, message: str) -> None:
    path = pairs / f"00000/000000000{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(pairs)
    assert str(path) in str(caught.value)


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: missing; --root is the output folder of img2dataset"):
        read(tmp_path / "none")
    with pytest.raises(UserError, match="holds no images"):
        read(tmp_path)


def test_facts_of_the_real_form() -> None:
    facts = {"caption": None, "url": "http://x", "key": "000000000", "status": "failed_to_download",
             "error_message": "HTTP Error 404", "width": None, "height": None, "original_width": None,
             "original_height": None, "exif": None, "sha256": None}  # fmt: skip
    assert img2dataset.Facts.model_validate_json(json.dumps(facts)).status == "failed_to_download"
