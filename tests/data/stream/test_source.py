"""What a location stands for, and that no sample of it is lost without being counted."""

import json
import os
from pathlib import Path

import pytest

from reid_dist.data.exclude import Exclusions
from reid_dist.data.remote import MAX_TARS
from reid_dist.data.sample import content_digest
from reid_dist.data.stream.source import Pair, StreamSource
from reid_dist.errors import UserError
from tests.data.stream_files import write_set, write_tars
from tests.hostile_tars import gzipped, join, jpeg, member, pairs


def _all(source: StreamSource) -> list[Pair]:
    return [pair for number, tar in enumerate(source.tars) for pair in source.pairs(tar, number)]


def _names(source: StreamSource) -> list[str]:
    return [os.path.basename(tar.location) for tar in source.tars]


def test_a_shard_set_gives_its_training_split(tmp_path: Path) -> None:
    source = StreamSource(write_set(tmp_path / "one", [3, 0, 5], other=2))
    # The second tar holds nothing to train on and is not opened.
    assert _names(source) == ["one-000000.tar", "one-000002.tar"]
    assert source.samples == 8 and source.ours and source.excluded == 0
    found = _all(source)
    numbers = [2, 3, 4, 9, 10, 11, 12, 13]
    assert [pair.key for pair in found] == [f"s{number:06d}" for number in numbers]
    assert [pair.image for pair in found] == [jpeg(number) for number in numbers]
    assert [json.loads(pair.text)["captions"] for pair in found] == [[f"picture {n} caption 0"] for n in numbers]
    assert [pair.digests for pair in found] == [(content_digest(p.image), content_digest(p.text)) for p in found]
    assert [(pair.tar, pair.ordinal) for pair in found] == [(0, 2), (0, 3), (0, 4), *((1, n) for n in range(2, 7))]


def test_exclusions_are_honoured(tmp_path: Path) -> None:
    import hashlib

    folder = write_set(tmp_path / "one", [3, 2])
    images = frozenset({hashlib.sha256(jpeg(4)).hexdigest()})
    source = StreamSource(folder, Exclusions(frozenset({"one:000001", "other:7"}), images))
    assert (source.excluded, source.samples) == (2, 3)
    assert [pair.key for pair in _all(source)] == ["s000000", "s000002", "s000003"]
    assert StreamSource(folder).identity() != source.identity()
    with pytest.raises(UserError, match="no training samples"):
        StreamSource(folder, Exclusions(frozenset(f"one:{n:06d}" for n in range(5))))
    tars = write_tars(tmp_path / "tars", [2])
    with pytest.raises(UserError, match=r"exclusions need an index; make one with `python -m shards.index build"):
        StreamSource(tars, Exclusions(frozenset({"one:000001"})))


def test_tars_by_folder_pattern_list_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tars(tmp_path / "cc3m", [2] * 12)
    (folder / "00003_stats.json").write_text("{}")
    (folder / ".hidden.tar").write_bytes(b"")
    everything = [f"{n:05d}.tar" for n in range(12)]
    assert _names(StreamSource(folder)) == everything
    assert _names(StreamSource(f"{folder}/{{00000..00011}}.tar")) == everything
    assert _names(StreamSource(f"file://{folder}/{{00008..00010}}.tar")) == everything[8:11]
    assert _names(StreamSource(folder / "00002.tar")) == ["00002.tar"]
    listed = tmp_path / "tars.txt"
    listed.write_text(f"# mine\ncc3m/00004.tar\n\n{folder}/{{00006..00007}}.tar\nhttps://host/a/00001.tar?token=x\n")
    source = StreamSource(listed)
    assert [tar.location for tar in source.tars] == [
        f"{tmp_path}/cc3m/00004.tar",
        f"{folder}/00006.tar",
        f"{folder}/00007.tar",
        "https://host/a/00001.tar?token=x",
    ]
    monkeypatch.chdir(tmp_path)
    assert len(StreamSource("cc3m/{00000..00001}.tar").tars) == 2
    assert len(StreamSource("https://host/{0..3}/{00000..00009}.tar").tars) == 40
    assert StreamSource(folder).samples is None
    assert [pair.text for pair in _all(StreamSource("cc3m"))] == [f"picture {n}".encode() for n in range(24)]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:cat a.tar", "scheme pipe: is not read"),
        ("gs://bucket/{0..3}.tar", "scheme gs: is not read"),
        ("https://a/1.tar::s3://b", "chains of file systems"),
        ("x/{a,b}.tar", r"braces hold a range of numbers"),
        ("x/{0..3..2}.tar", r"braces hold a range of numbers"),
        ("x/{{0..3}}.tar", r"braces hold a range of numbers"),
        ("x/{0..3.tar", r"braces hold a range of numbers"),
        ("x/{0..999999999}.tar", f"stands for 1000000000 tars, more than {MAX_TARS}"),
        ("x/{0..9999}/{0..9999}.tar", f"stands for 100000000 tars, more than {MAX_TARS}"),
        ("x/{0..1}.tar", "x/0.tar: no such tar; correct the name or pattern x/{0..1}.tar"),
        ("nowhere", "nowhere: no folder, .tar or list"),
        ("nowhere.txt", "the list of tars cannot be read"),
        (".", "holds neither manifest.json nor .tar files"),
        ("twice.txt", "names 1 tars more than once"),
        ("hostile.txt", "scheme pipe: is not read"),
        ("empty.txt", "names no tars"),
        ("latin.txt", "not UTF-8 text"),
    ],
)
def test_wrong_locations(location: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.txt").write_text("pipe:touch ran.tar\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\n")
    (write_tars(tmp_path / "t", [1]) / "a.tar").touch()
    (tmp_path / "twice.txt").write_text("t/00000.tar\nt/{00000..00000}.tar\n")
    with pytest.raises(UserError, match=message) as caught:
        StreamSource(location)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran.tar").exists()


def _tar_of(tmp_path: Path, content: bytes) -> StreamSource:
    path = tmp_path / "00000.tar"
    path.write_bytes(content)
    return StreamSource(path)


def test_problems_name_tar_key_and_remedy(tmp_path: Path) -> None:
    good = pairs(2, "img2dataset")
    source = _tar_of(tmp_path, join([*good[:3], member("bad.jpg", b"x"), *good[3:]]))
    found = _all(source)
    assert [pair.key for pair in found] == ["000000000", "bad", "000000001"]
    assert found[1].problem == (
        f"{tmp_path}/00000.tar, sample bad: half a sample: no .txt or .json beside its image; "
        f"get the tar again, or write it as shards with `python -m shards.write img2dataset`"
    )


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (pair,) = _all(_tar_of(tmp_path, join([member("a\n\x1b[2Jb.jpg", b"x"), member("a\n\x1b[2Jb.jpg", b"x")])))
    assert pair.problem.isprintable() and r"sample 'a\n\x1b[2Jb.jpg': " in pair.problem


@pytest.mark.parametrize("spoil", [lambda tar: tar[:-1500], gzipped, lambda tar: tar + tar, lambda tar: b""])
def test_a_broken_tar_without_a_count_is_an_error(spoil: object, tmp_path: Path) -> None:
    source = _tar_of(tmp_path, spoil(join(pairs(3))))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"00000.tar: .*(get the file again|unpack it)"):
        _all(source)


def test_what_a_broken_tar_of_a_set_lacks_is_counted(tmp_path: Path) -> None:
    source = StreamSource(write_set(tmp_path / "one", [4, 4], other=1))
    path = Path(source.tars[1].location)
    data = bytearray(path.read_bytes())
    fourth = source.shards.index["image_offset"][8] - 512  # type: ignore[union-attr]
    data[fourth] ^= 1  # the header of the third training sample of the second tar
    path.write_bytes(bytes(data))
    found = _all(source)
    # The one before the damage may not be whole: what follows it cannot be read.
    assert [bool(pair.problem) for pair in found] == [False] * 5 + [True] * 3
    assert "one-000001.tar: at byte" in found[-1].problem and "not a tar header" in found[-1].problem


def test_a_tar_that_vanished_or_changed_size(tmp_path: Path) -> None:
    source = StreamSource(write_set(tmp_path / "one", [4, 4]))
    first, second = (Path(tar.location) for tar in source.tars)
    first.unlink()
    second.write_bytes(second.read_bytes() + b"\0")
    found = _all(source)
    assert len(found) == 8 and all(pair.problem for pair in found)
    assert "one-000000.tar: cannot be read (No such file or directory); copy it again" in found[0].problem
    assert "bytes, but manifest.json says" in found[4].problem
    os.mkfifo(first)
    assert "not a file" in next(source.pairs(source.tars[0], 0)).problem  # and is not waited for


def test_a_sample_that_the_index_does_not_know(tmp_path: Path) -> None:
    """Same size and count, but the members of one sample stand elsewhere: two problems, none lost."""
    source = StreamSource(write_set(tmp_path / "one", [3]))
    path = Path(source.tars[0].location)
    data, head = path.read_bytes(), len(member("s000000.jpg", jpeg(0)))
    end = source.shards.index["image_offset"][1] - 512  # type: ignore[union-attr]
    path.write_bytes(data[head:end] + data[:head] + data[end:])
    found = _all(source)
    problems = [pair.problem for pair in found if pair.problem]
    assert len(found) == 4 and len(problems) == 2
    assert "sample s000000: it is not in the index" in problems[0]
    assert "2 of the 3 samples in the index" in problems[1]
