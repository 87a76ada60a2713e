"""Tars as they come: samples of adjacent members, and everything else named, never run and never lost."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from reid_dist.data.sample import MAX_IMAGE_BYTES, MAX_JSON_BYTES
from reid_dist.data.stream.tar import BrokenShardError, TarSample, tar_samples
from tests.hostile_tars import END, gzipped, join, jpeg, member, pairs, payload


def _read(tar: bytes, text: str = "txt") -> list[TarSample]:
    return list(tar_samples(io.BytesIO(tar), "some.tar", text))


def _problems(tar: bytes) -> list[tuple[str, str]]:
    return [(sample.key, sample.problem) for sample in _read(tar)]


@pytest.mark.parametrize("form", ["ours", "img2dataset"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_tarfile(form: str, format: int, tmp_path: Path) -> None:
    """Also with what Python's tarfile adds: long names, times with a fraction (img2dataset's are such), folders."""
    rng = np.random.default_rng(format)
    path, expected = tmp_path / "a.tar", []
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number in range(30):
            key = f"folder/{number:09d}" + ("x" * int(rng.integers(0, 140)) if format != tarfile.USTAR_FORMAT else "")
            image, text = rng.bytes(int(rng.integers(0, 2000))), f"caption {number} ä".encode()
            contents = {"jpg": image, "txt": text} if form == "img2dataset" else {"json": text, "png": image}
            for extension, content in contents.items():
                info = tarfile.TarInfo(f"./{key}.{extension}")
                info.size, info.mtime = len(content), 1.7e9 + rng.random()
                tar.addfile(info, io.BytesIO(content))
            expected.append((number, key, image, text, form == "ours", ""))
    with path.open("rb") as file:
        found = list(tar_samples(file, "a.tar"))
    assert [(s.ordinal, s.key, s.image, s.text, s.is_json, s.problem) for s in found] == expected
    data = path.read_bytes()
    assert all(data[s.offset : s.offset + len(s.image)] == s.image for s in found)


def test_webdataset_sees_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(join(pairs(7, "img2dataset")))
    theirs = webdataset.WebDataset(str(path), shardshuffle=False)
    ours = _read(path.read_bytes())
    assert [(each["__key__"], each["jpg"], each["txt"]) for each in theirs] == [
        (each.key, each.image, each.text) for each in ours
    ]


def test_the_wanted_text_is_taken() -> None:
    tar = join(pairs(1, "img2dataset"))
    assert _read(tar)[0].text == b"picture 0"
    assert _read(tar, "json")[0].text.startswith(b'{"caption": "picture 0"') and _read(tar, "json")[0].is_json


def test_other_members_of_a_sample_are_left_alone() -> None:
    tar = join([member("a.jpg", b"image"), member("a.npy", b"any"), member("a.txt", b"text"), member("b.cls", b"1")])
    first, second = _read(tar)
    assert (first.image, first.text, first.problem) == (b"image", b"text", "")
    assert second.problem == "half a sample: no image beside .cls"


def test_interleaved_members_are_four_problems_not_two_samples() -> None:
    tar = join([member("1.jpg"), member("2.jpg"), member("1.txt"), member("2.txt")])
    assert _problems(tar) == [
        ("1", "half a sample: no .txt or .json beside its image"),
        ("2", "half a sample: no .txt or .json beside its image"),
        ("1", "its key occurs before: members of a sample must be adjacent and keys unique"),
        ("2", "its key occurs before: members of a sample must be adjacent and keys unique"),
    ]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([member("a.jpg"), member("a.jpg"), member("a.txt")], "it has two .jpg members"),
        ([member("a.jpg"), member("a.png"), member("a.txt")], "it has two images"),
        ([member("a.txt")], "half a sample: no image beside .txt"),
        ([member("a.jpg", kind=b"2", link="/etc/passwd"), member("a.txt")], "it is a symbolic link"),
        ([member("a.jpg", kind=b"1", link="b.jpg"), member("a.txt")], "it is a hard link"),
        ([member("a.jpg", kind=b"3"), member("a.txt")], "it is a device"),
        ([member("a.jpg", kind=b"6"), member("a.txt")], "it is a pipe"),
        ([member("a.jpg", kind=b"S"), member("a.txt")], "it is no plain file"),
        ([member("../a.jpg"), member("../a.txt")], "'../a.jpg' is no name of a sample's file"),
        ([member("x/../../a.jpg")], "'x/../../a.jpg' is no name of a sample's file"),
        ([member("/etc/a.jpg")], "'/etc/a.jpg' is no name of a sample's file"),
        ([member("a\\b.jpg")], "'a\\\\b.jpg' is no name of a sample's file"),
        ([member("a\nb.jpg")], "'a\\nb.jpg' is no name of a sample's file"),
        ([member("README")], "'README' is no name of a sample's file"),
        ([member("a.jpg"), member("a.txt", bytes(MAX_JSON_BYTES + 1))], ".txt has 65537 bytes, more than the cap"),
        ([member("a.jpg"), member("a.json", b" " * 1_000_000)], ".json has 1000000 bytes, more than the cap"),
        ([member("a.jpg", bytes(MAX_IMAGE_BYTES + 1)), member("a.txt")], ".jpg has 20000001 bytes, more than the cap"),
    ],
)
def test_a_bad_sample_is_named_and_the_others_are_read(members: list[bytes], problem: str) -> None:
    good = pairs(2)
    found = _read(join([*good[:2], *members, *good[2:]]))
    assert [sample.problem for sample in found if not sample.problem] == ["", ""]
    assert found[1].problem.startswith(problem)
    assert [sample.ordinal for sample in found] == list(range(len(found)))


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    for extension in ("pkl", "pyd", "pth"):
        tar = join([member("a.jpg", jpeg(0)), member(f"a.{extension}", payload(trace)), member("a.txt", b"x")])
        assert _problems(tar) == [("a", f".{extension} is code (a pickle, say), not data")]
    assert not trace.exists()


@pytest.mark.parametrize("compress", [gzipped, __import__("bz2").compress, __import__("lzma").compress])
def test_compressed_tars_are_refused(compress: object) -> None:
    with pytest.raises(BrokenShardError, match=r"some.tar: is (gzip|bzip2|xz), not a plain tar; unpack it"):
        _read(compress(join(pairs(9))))  # type: ignore[operator]


def test_a_tar_cut_anywhere_is_noticed() -> None:
    """Complete samples before the cut are given, then the error; a cut between two samples is one as well."""
    tar = join(pairs(3))
    whole = _read(tar)
    ends = [sample.offset for sample in whole[1:]]
    for cut in [*range(0, len(tar) - len(END), 256), *(end - 512 for end in ends), len(tar) - len(END)]:
        found: list[TarSample] = []
        with pytest.raises(BrokenShardError, match=r"some.tar: at byte \d+: .*(truncated|not a tar header)"):
            found.extend(tar_samples(io.BytesIO(tar[:cut]), "some.tar", "json"))
        assert found == whole[: len(found)] and len(found) < len(whole)


def test_flipped_header_bits_and_foreign_bytes_are_noticed() -> None:
    tar = join(pairs(3))
    for bit in (0, 100 * 8, 124 * 8 + 1, 156 * 8, 200 * 8):
        broken = bytearray(tar)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BrokenShardError, match="at byte 0: not a tar header"):
            _read(bytes(broken))
    with pytest.raises(BrokenShardError, match="at byte 0: not a tar header"):
        _read(b"<html>" * 500)
    with pytest.raises(BrokenShardError, match="ends without the mark of its end"):
        _read(b"")


def test_what_follows_the_end_is_not_lost_without_a_word() -> None:
    tar = join(pairs(2))
    assert len(_read(tar + bytes(9000))) == 2
    with pytest.raises(BrokenShardError, match="data behind the mark of its end"):
        _read(tar + tar)


def test_extended_headers_that_lie_are_refused() -> None:
    def pax(**values: str) -> bytes:
        lines = b""
        for key, value in values.items():
            body = f" {key.replace('_', '.')}={value}\n".encode()
            size = len(body) + 2
            lines += f"{size}".encode() + body
        return member("pax", lines, kind=b"x")

    assert [s.key for s in _read(join([pax(path="b.jpg"), member("a.jpg", b"1"), member("b.txt", b"2")]))] == ["b"]
    with pytest.raises(BrokenShardError, match="a size that is not a number"):
        _read(join([pax(size="-5"), member("a.jpg", b"1")]))
    with pytest.raises(BrokenShardError, match="malformed extended header"):
        _read(join([member("pax", b"99999 path=x\n", kind=b"x"), member("a.jpg", b"1")]))
    with pytest.raises(BrokenShardError, match="a global header that names or sizes"):
        _read(join([member("pax", b"12 path=x.j\n", kind=b"g"), member("a.jpg", b"1")]))
    with pytest.raises(BrokenShardError, match="extended header without a member"):
        _read(join([pax(path="b.jpg")]))
    sparse = _read(join([pax(GNU_sparse_map="0"), member("a.jpg", b"1"), member("a.txt", b"1")]))
    assert sparse[0].problem == "it is a sparse file"


@pytest.mark.parametrize("seed", range(200))
def test_damage_of_any_kind_ends_in_a_line_and_not_in_a_traceback(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tar = bytearray(join(pairs(3, "img2dataset" if seed % 2 else "ours")))
    for _ in range(int(rng.integers(1, 4))):
        # Headers are where damage matters: they begin at multiples of 512.
        at = int(rng.integers(len(tar) // 512)) * 512 + int(rng.integers(512))
        kind = int(rng.integers(3))
        if kind == 0:
            tar[at] = int(rng.integers(256))
        elif kind == 1:
            del tar[at : at + int(rng.integers(1, 1500))]
        else:
            tar[at:at] = rng.bytes(int(rng.integers(1, 1500)))
    _fix_sums(tar)
    try:
        found = _read(bytes(tar))
    except BrokenShardError as error:
        assert "\n" not in str(error) and str(error).startswith("some.tar: ")
    else:
        assert all(sample.problem or (sample.image and sample.key) for sample in found)
        assert all("\n" not in sample.problem for sample in found)


def _fix_sums(tar: bytearray) -> None:
    """Right checksums for every block that looks like a header, so that damage gets past them."""
    for start in range(0, len(tar) - 511, 512):
        if tar[start + 257 : start + 262] == b"ustar":
            tar[start + 148 : start + 156] = b" " * 8
            tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
