"""People of test splits found in training sets, by file, by pixels and by name."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.cache import Images, Size
from reid_dist.data.contamination import find_contamination
from reid_dist.data.exclude import read_exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import Sample
from reid_dist.data.transforms import Pixels
from reid_dist.errors import UserError
from shards.checking.overlap import Overlap, find_overlaps, source_name, unrecognised, write_exclusions
from shards.index import ShardWriter, file_sha256
from shards.verify import main
from shards.write import main as write_main


class Photo(NamedTuple):
    """One image to put into a set."""

    pid: str
    image: bytes
    role: str = "train"
    split: str = "train"
    source: str = ""


Make = Callable[..., Path]


def overlap(*folders: Path, train: str = "") -> Overlap:
    """The overlap of the training split of one set with another."""
    found = find_overlaps(map(str, folders))
    return next(each for each in found if not train or Path(each.train).name == train)


def picture(number: int, size: tuple[int, int] = (12, 6), comment: bytes = b"", quality: int = 90) -> bytes:
    """A noise JPEG that depends on its number; a comment changes the file and not the pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", comment=comment, quality=quality)
    return buffer.getvalue()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a set of some photos."""

    def write(name: str, *photos: Photo, card: dict[str, Any] | None = None) -> Path:
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
        writer.finish(card or {})
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
    found, back = find_overlaps(map(str, (train, tested)))
    assert (found.train, found.evaluation) == (str(train), str(tested))
    # The same file has the same pixels.
    assert found.images == {"bytes": 1, "pixels": 2, "name": 2}
    assert found.pids == {"train:file", "train:pixels", "train:market", "train:name"}
    # The tested set's own training image is no one's; a picture that both only test is nobody's training.
    assert back.train == str(tested) and not back


def test_nothing_is_shared_by_accident(make: Make) -> None:
    train = make("a", *(Photo(str(n), picture(n), source=f"imgs/{n:04d}_c1_x.jpg") for n in range(8)))
    photos = (Photo(str(n), picture(50 + n), "gallery", "test", f"imgs/{n:04d}_c1_x.jpg") for n in range(8))
    found = overlap(train, make("b", *photos))
    assert found.images == {"bytes": 0, "pixels": 0, "name": 0} and not found.pids and not found


def test_only_images_of_a_common_size_are_decoded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []

    def recording(shards: ShardSet, size: Size) -> Callable[[int], Pixels]:
        def decode(row: int) -> Pixels:
            decoded.append((shards.name, row))
            return Images(shards, size)(row)

        return decode

    monkeypatch.setattr("shards.checking.overlap.Images", recording)
    train = make("a", Photo("1", picture(1, (12, 6))), Photo("2", picture(2, (6, 12))), Photo("3", picture(3, (9, 9))))
    tested = make(
        "b", Photo("1", picture(4, (12, 6)), "query", "test"), Photo("2", picture(5, (30, 30)), "gallery", "test")
    )
    find_overlaps(map(str, (train, tested)))
    assert sorted(decoded) == [("a", 0), ("b", 0)]


def test_a_set_is_not_compared_with_itself(make: Make, tmp_path: Path) -> None:
    # Its training identity 1 is also tested: that is for its own split to answer.
    one = make("one", Photo("1", picture(1)), Photo("2", picture(2)), Photo("3", picture(1), "gallery", "test"))
    two = make("two", Photo("1", picture(3)), Photo("2", picture(2), "gallery", "test"))
    copy = shutil.copytree(one, tmp_path / "copy")
    found = find_overlaps(map(str, (one, one / ".." / "one", two, copy, two)))
    assert [(Path(each.train).name, Path(each.evaluation).name, each.pids) for each in found] == [
        ("one", "two", {"one:2"}),
        ("two", "one", frozenset()),
    ]
    for alone in ([one], [one, copy]):
        with pytest.raises(UserError, match="nothing to compare; name two sets, one with a training"):
            find_overlaps(map(str, alone))


def test_processes_do_not_matter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.checking.overlap._JOB", 3)
    one = make("one", *(Photo(str(n), picture(n)) for n in range(10)))
    two = make("two", *(Photo(str(n), picture(n, comment=b"x" * n), "gallery", "test") for n in range(5, 12)))
    single, several = (find_overlaps(map(str, (one, two)), workers) for workers in (1, 2))
    assert single == several
    assert single[0].pids == {f"one:{n}" for n in range(5, 10)}


MARKET: dict[str, Any] = {"converter": "market1501"}
CUHK: dict[str, Any] = {"converter": "cuhk_pedes", "contains": ["market1501"]}


def test_known_families(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one = make("one", Photo("1", picture(1)), card=CUHK)
    two = make("two", Photo("1", picture(2), "query", "test"), card=MARKET)
    (found,) = find_overlaps(map(str, (one, two)))
    assert not found and found.origins == ("market1501",) and unrecognised([found]) == [found]
    assert main(["--overlap", str(one), str(two)]) == 1
    printed = capsys.readouterr().out
    assert f"warning: {one} and {two} both show people of market1501, yet no image, pixels or name is" in printed
    # Where some copies can be told, all of them can.
    three = make("three", Photo("1", picture(4)), Photo("2", picture(1), "query", "test"), card=MARKET)
    four = make("four", Photo("5", picture(6), "gallery", "test"), Photo("1", picture(1)), card=CUHK)
    there, back = find_overlaps(map(str, (four, three)))
    assert there and not back and back.origins and unrecognised([there, back]) == []
    # A drawn set has the names of the real one and none of its people.
    name = "query/0002_c1s1_000451_03.jpg"
    real = make("real", Photo("1", picture(1), source=name), card=CUHK)
    drawn = make("drawn", Photo("1", picture(3), "query", "test", name), card={**MARKET, "world": {"version": 1}})
    assert main(["--overlap", str(real), str(drawn)]) == 0


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
    assert main(["--overlap", *map(str, folders), "--out", str(out)]) == 1
    assert read_exclusions(out).pids == {"cuhk_pedes:2"}
    sets = [ShardSet(folder) for folder in folders]
    assert find_contamination(sets, sets) and not find_contamination(sets, sets, read_exclusions(out))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("imgs/Market/0002_c1s1_000451_03.jpg", "0002_c1s1_000451_03"),
        ("0002_c1s1_000451_03.jpg.jpg", "0002_c1s1_000451_03"),
        ("a/market-0002_c1s1_000451_03_crop.png", "0002_c1s1_000451_03"),
        ("a/10002_c1s1_000451_03.jpg", "10002_c1s1_000451_03"),
        ("0002_c1s1_000451_03/1.jpg", None),
        ("a/0000_045_12_0303morning_0006_2.JPG", "0000_045_12_0303morning_0006_2"),
        ("train/0000/ICFG-0000_012_05_0303afternoon_0620_0_crop.jpg", "0000_012_05_0303afternoon_0620_0"),
        ("0000_012_05_0303noon_0620_0.jpg", "0000_012_05_0303noon_0620_0"),
        ("a/twelve-chars.tail.jpg", "twelve-chars.tail"),
        ("a/exactly12chr.jpg", "exactly12chr"),
        ("a/only11chars.jpg", None),
        ("a/p12_s1.jpg", None),
        ("a/short.jpg.jpg", None),
        ("0002_c1s1_000451_031.jpg", "0002_c1s1_000451_031"),
    ],
)
def test_distinctive_names(source: str, name: str | None) -> None:
    assert source_name(source) == name


def test_command(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make("one", Photo("7", picture(1)), Photo("12", picture(2)), Photo("8", picture(3)))
    two = make("two", Photo("1", picture(2), "query", "test"), Photo("2", picture(1), "gallery", "test"))
    out, report = tmp_path / "new folder" / "exclude.txt", tmp_path / "report.json"
    arguments = ["--overlap", str(one), str(two), "--out", str(out), "--json", str(report)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    head = re.split(" {2,}", printed[0])
    assert head[:2] == ["train set", "eval set"] and head[2:5] == ["same bytes", "same pixels", "same name"]
    assert head[5:] == ["identities excluded", "both show people of"]
    assert printed[1].split() == [str(one), str(two), "2", "2", "0", "2"]
    assert printed[2:] == ["identities excluded in all: 2", f"{out}: written; name it as data.exclude"]
    compared = [file_sha256(folder / "index.npy") for folder in (one, two)]
    assert out.read_text().splitlines() == [
        "# Identities that are not to be trained on, by shards.verify --overlap",
        f"# python -m shards.verify --overlap {one} {two} --out '{out}' --json {report}",
        *(f"# {line}" for line in printed[:3]),
        *(f"# compared: {folder.name} {index}" for folder, index in zip((one, two), compared, strict=True)),
        "one:12",
        "one:7",
    ]
    assert read_exclusions(out).pids == {"one:7", "one:12"} and read_exclusions(out).compared == set(compared)
    assert json.loads(report.read_text())["overlaps"][0]["pids"] == ["one:12", "one:7"]
    before = out.read_bytes()
    assert main(arguments) == 1  # a second time, over its own file
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["exclude.txt"]
    capsys.readouterr()
    assert main(arguments[:3]) == 1
    assert "to leave these out of training, write a list: --out exclude.txt" in capsys.readouterr().out


def test_secrets_of_urls_stay_out_of_the_list(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardSet(make("one", Photo("1", picture(1))))
    monkeypatch.setattr("shards.verify.find_overlaps", lambda *_: [])
    monkeypatch.setattr("shards.verify.ShardSet", lambda _: opened)
    out = tmp_path / "exclude.txt"
    assert main(["--overlap", "https://me:s3cret@host/a?token=s3cret", "b", "--out", str(out)]) == 0
    assert "--overlap https://host/a b --out" in out.read_text() and "s3cret" not in out.read_text()


def test_nothing_shared_writes_a_head_only(make: Make, tmp_path: Path) -> None:
    one, out = make("one", Photo("1", picture(1))), tmp_path / "exclude.txt"
    two = make("two", Photo("2", picture(2), "query", "test"))
    assert main(["--overlap", str(one), str(two), "--out", str(out)]) == 0
    assert all(line.startswith("#") for line in out.read_text().splitlines())
    assert not read_exclusions(out)


def test_wrong_input(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, tested = make("a", Photo("1", picture(1))), make("b", Photo("1", picture(2), "query", "test"))
    bad = make("bad", Photo("1", picture(3), "query", "test"))
    tar = next(bad.glob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(picture(3), b"\xff\xd8" + bytes(len(picture(3)) - 2)))
    notes = tmp_path / "notes.txt"
    notes.write_text("people who asked\n")
    out = tmp_path / "exclude.txt"
    for sets, given, message in [
        ((train, tmp_path / "none"), out, "none: no such shard folder"),
        ((train, train), out, f"{train}: nothing to compare"),
        ((tested, bad), out, f"{tested}, {bad}: nothing to compare"),
        ((train, bad), out, "bad (bad), shard bad-000000.tar, sample s0"),
        ((train, tested), tmp_path, "is a folder; name a file"),
        ((train, tested), notes, "exists and is not from this program"),
    ]:
        code = main(["--overlap", *map(str, sets), "--out", str(given)])
        error = capsys.readouterr().err
        assert code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert main(["--overlap", str(train), str(tested), "--expect"]) == 2
    assert main(["--overlap", str(train), str(tested), "--workers", "0"]) == 2
    assert not out.exists() and notes.read_text() == "people who asked\n"


def test_identities_that_a_list_cannot_hold(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make("one", Photo("a person", picture(1)))
    two = make("two", Photo("1", picture(1), "query", "test"))
    assert main(["--overlap", str(one), str(two), "--out", str(tmp_path / "exclude.txt")]) == 2
    assert "identity 'one:a person' holds white space" in capsys.readouterr().err
    write_exclusions(tmp_path / "exclude.txt", ["b:2", "a:1", "b:2"], [], ["a folder\nwith a line break"])
    assert read_exclusions(tmp_path / "exclude.txt").pids == {"a:1", "b:2"}


def test_interrupted_write_leaves_the_old_list(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make("one", Photo("1", picture(1))), make("two", Photo("1", picture(1), "query", "test"))
    out = tmp_path / "exclude.txt"
    write_exclusions(out, ["a:1"], [], [])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.writing.files.os.fsync", full)
    assert main(["--overlap", str(one), str(two), "--out", str(out)]) == 1
    assert read_exclusions(out).pids == {"a:1"}
