"""People of test splits found in training sets, by file, by pixels and by name."""

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.cache import Images, Size
from reid_dist.data.exclude import read_exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import Sample
from reid_dist.data.transforms import Pixels
from shards.index import ShardWriter
from shards.overlap import find_overlaps, main, source_name, write_exclusions
from shards.write import main as write_main


class Photo(NamedTuple):
    """One image to put into a set."""

    pid: str
    image: bytes
    role: str = "train"
    split: str = "train"
    source: str = ""


Make = Callable[..., Path]


def picture(number: int, size: tuple[int, int] = (12, 6), comment: bytes = b"", quality: int = 90) -> bytes:
    """A noise JPEG that depends on its number; a comment changes the file and not the pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", comment=comment, quality=quality)
    return buffer.getvalue()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a set of some photos."""

    def write(name: str, *photos: Photo) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        writer = ShardWriter(folder, name, 10_000)
        for number, photo in enumerate(photos):
            width, height = Image.open(io.BytesIO(photo.image)).size
            sample = Sample.model_validate(
                {
                    "dataset": name,
                    "pid": f"{name}:{photo.pid}",
                    "camid": 0,
                    "split": photo.split,
                    "role": photo.role,
                    "source": photo.source or f"{name}/{number}.jpg",
                    "width": width,
                    "height": height,
                    "sha256": hashlib.sha256(photo.image).hexdigest(),
                }
            )
            writer.add(f"s{number}", sample, photo.image)
        writer.finish({})
        return folder

    return write


def test_each_criterion_finds_its_copies(make: Make) -> None:
    market_name = "0002_c1s1_000451_03"
    train = make(
        "train",
        Photo("file", picture(1)),
        Photo("file", picture(101)),
        Photo("pixels", picture(2, comment=b"a camera's serial number")),
        Photo("market", picture(3, (10, 5), quality=50), source=f"imgs/Market/{market_name}.jpg"),
        Photo("name", picture(4, (10, 5), quality=50), source="imgs/the-same-name.png"),
        Photo("nobody", picture(5), source="imgs/0001_c1.jpg"),
        Photo("junk", picture(6)),
        Photo("tested", picture(1), role="gallery", split="test"),
    )
    tested = make(
        "tested",
        Photo("1", picture(1), role="gallery", split="test"),
        Photo("2", picture(2), role="query", split="val"),
        Photo("3", picture(3), role="distractor", split="test", source=f"query/{market_name}.jpg.jpg"),
        Photo("4", picture(4), role="gallery", split="val", source="elsewhere/the-same-name.jpg"),
        Photo("5", picture(7), role="gallery", split="test", source="0001_c1.jpg"),
        Photo("-1", picture(6), role="junk", split="test"),
        Photo("6", picture(5)),
    )
    (found,) = find_overlaps([train], [tested])
    assert (found.train, found.evaluation) == (train, tested)
    # The same file has the same pixels.
    assert found.images == {"bytes": 1, "pixels": 2, "name": 2}
    assert found.pids == {"train:file", "train:pixels", "train:market", "train:name"}


def test_nothing_is_shared_by_accident(make: Make) -> None:
    train = make("a", *(Photo(str(n), picture(n), source=f"imgs/{n:04d}_c1_x.jpg") for n in range(8)))
    photos = (Photo(str(n), picture(50 + n), "gallery", "test", f"imgs/{n:04d}_c1_x.jpg") for n in range(8))
    (found,) = find_overlaps([train], [make("b", *photos)])
    assert found.images == {"bytes": 0, "pixels": 0, "name": 0} and not found.pids


def test_only_images_of_a_common_size_are_decoded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []

    def recording(shards: ShardSet, size: Size) -> Callable[[int], Pixels]:
        def decode(row: int) -> Pixels:
            decoded.append((shards.name, row))
            return Images(shards, size)(row)

        return decode

    monkeypatch.setattr("shards.overlap.Images", recording)
    train = make("a", Photo("1", picture(1, (12, 6))), Photo("2", picture(2, (6, 12))), Photo("3", picture(3, (9, 9))))
    tested = make(
        "b", Photo("1", picture(4, (12, 6)), "query", "test"), Photo("2", picture(5, (30, 30)), "gallery", "test")
    )
    find_overlaps([train], [tested])
    assert sorted(decoded) == [("a", 0), ("b", 0)]


def test_a_set_is_not_compared_with_itself(make: Make) -> None:
    # Its training identity 1 is also tested: that is for its own split to answer.
    one = make("one", Photo("1", picture(1)), Photo("2", picture(2)), Photo("3", picture(1), "gallery", "test"))
    two = make("two", Photo("1", picture(3)), Photo("2", picture(2), "gallery", "test"))
    found = find_overlaps([one, two], [one / ".." / "one", two, two])
    assert [(each.train.name, each.evaluation.name, each.pids) for each in found] == [
        ("one", "two", {"one:2"}),
        ("two", "one", frozenset()),
    ]
    assert find_overlaps([one], [one]) == []


def test_converted_trees(cuhk: Path, market: Path, tmp_path: Path) -> None:
    copy = "Market/0001_c1s1_001051_00.jpg"
    (cuhk / "imgs/Market").mkdir()
    (cuhk / "imgs" / copy).write_bytes((market / "query/0001_c1s1_001051_00.jpg").read_bytes())
    annotation = cuhk / "reid_raw.json"
    annotation.write_text(annotation.read_text().replace("cam_a/002.jpg", copy))
    folders = [tmp_path / "cuhk_pedes", tmp_path / "market1501"]
    for folder, root in zip(folders, (cuhk, market), strict=True):
        assert write_main([folder.name, "--root", str(root), "--out", str(folder), "--allow-mismatch"]) == 0
    out = tmp_path / "exclude.txt"
    sets = [str(folder) for folder in folders]
    assert main(["--train", *sets, "--eval", *sets, "--out", str(out)]) == 0
    assert read_exclusions(out) == {"cuhk_pedes:2"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("imgs/Market/0002_c1s1_000451_03.jpg", "0002_c1s1_000451_03"),
        ("0002_c1s1_000451_03.jpg.jpg", "0002_c1s1_000451_03"),
        ("a/market-0002_c1s1_000451_03_crop.png", "0002_c1s1_000451_03"),
        ("a/10002_c1s1_000451_03.jpg", "10002_c1s1_000451_03"),
        ("0002_c1s1_000451_03/1.jpg", None),
        ("a/0000_045_12_0303morning_0006_2.JPG", "0000_045_12_0303morning_0006_2"),
        ("a/twelve-chars.tail.jpg", "twelve-chars.tail"),
        ("a/exactly12chr.jpg", "exactly12chr"),
        ("a/only11chars.jpg", None),
        ("a/p12_s1.jpg", None),
    ],
)
def test_distinctive_names(source: str, name: str | None) -> None:
    assert source_name(source) == name


def test_command(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make("one", Photo("7", picture(1)), Photo("12", picture(2)), Photo("8", picture(3)))
    two = make("two", Photo("1", picture(2), "query", "test"), Photo("2", picture(1), "gallery", "test"))
    out = tmp_path / "new folder" / "exclude.txt"
    arguments = ["--train", str(one), "--eval", str(two), "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.split(" {2,}", printed[0]) == [
        "train set",
        "eval set",
        "same bytes",
        "same pixels",
        "same name",
        "identities excluded",
    ]
    assert printed[1].split() == [str(one), str(two), "2", "2", "0", "2"]
    assert printed[2:] == ["identities excluded in all: 2", f"{out}: written"]
    assert out.read_text().splitlines() == [
        "# Identities that are not to be trained on, by shards.overlap",
        f"# python -m shards.overlap --train {one} --eval {two} --out '{out}'",
        *(f"# {line}" for line in printed[:3]),
        "one:12",
        "one:7",
    ]
    assert read_exclusions(out) == {"one:7", "one:12"}
    before = out.read_bytes()
    assert main(arguments) == 0  # a second time, over its own file
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["exclude.txt"]


def test_nothing_shared_writes_a_head_only(make: Make, tmp_path: Path) -> None:
    one, out = make("one", Photo("1", picture(1)), Photo("2", picture(2), "query", "test")), tmp_path / "exclude.txt"
    assert main(["--train", str(one), "--eval", str(one), "--out", str(out)]) == 0
    assert all(line.startswith("#") for line in out.read_text().splitlines())
    assert read_exclusions(out) == frozenset()


def test_wrong_input(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, tested = make("a", Photo("1", picture(1))), make("b", Photo("1", picture(2), "query", "test"))
    bad = make("bad", Photo("1", picture(3), "query", "test"))
    tar = next(bad.glob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(picture(3), b"\xff\xd8" + bytes(len(picture(3)) - 2)))
    notes = tmp_path / "notes.txt"
    notes.write_text("people who asked\n")
    out = tmp_path / "exclude.txt"
    for given, message in [
        ((train, tmp_path / "none", out), "none: no such shard folder"),
        ((train, train, out), f"--eval {train}: has no images for that; leave the set out"),
        ((train, bad, out), "bad (bad), shard"),
        ((tested, bad, out), f"--train {tested}: has no images for that; leave the set out"),
        ((train, tested, tmp_path), "is a folder; name a file"),
        ((train, tested, notes), "exists and is not from this program"),
    ]:
        code = main(["--train", str(given[0]), "--eval", str(given[1]), "--out", str(given[2])])
        error = capsys.readouterr().err
        assert code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists() and notes.read_text() == "people who asked\n"


def test_identities_that_a_list_cannot_hold(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make("one", Photo("a person", picture(1)))
    two = make("two", Photo("1", picture(1), "query", "test"))
    assert main(["--train", str(one), "--eval", str(two), "--out", str(tmp_path / "exclude.txt")]) == 2
    assert "identity 'one:a person' holds white space" in capsys.readouterr().err
    write_exclusions(tmp_path / "exclude.txt", ["b:2", "a:1", "b:2"], ["a folder\nwith a line break"])
    assert read_exclusions(tmp_path / "exclude.txt") == {"a:1", "b:2"}


def test_interrupted_write_leaves_the_old_list(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make("one", Photo("1", picture(1))), make("two", Photo("1", picture(1), "query", "test"))
    out = tmp_path / "exclude.txt"
    write_exclusions(out, ["a:1"], [])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.index.os.fsync", full)
    assert main(["--train", str(one), "--eval", str(two), "--out", str(out)]) == 1
    assert read_exclusions(out) == {"a:1"}
