"""The tar walk: everything of a good tar, an error for every other."""

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards.indexing.safe_tar import walk

Members = list[tuple[str, bytes]]


def _tar(members: Members, form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _odd(name: str, **fields: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info)
    return buffer.getvalue()


class _Drip(io.RawIOBase):
    """A stream that cannot seek and hands out few bytes at a time, as a socket does."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 333))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_same_members_as_the_standard_library(form: int, tmp_path: Path) -> None:
    rng = random.Random(form)
    sizes = [0, 1, 511, 512, 513, 5_000, 70_000]
    members = [(f"{'d/' * (number % 3)}{number:05d}.jpg", rng.randbytes(size)) for number, size in enumerate(sizes)]
    if form != tarfile.USTAR_FORMAT:
        members += [("long/" * 30 + "x.txt", b"a"), ("ä €.json", b"b" * 700)]
    # A time with a fraction, as webdataset's writer leaves it, makes a pax header for every member.
    data = _tar(members, form, mtime=1.5)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    for source in (path, io.BytesIO(data), _Drip(data)):
        found = list(walk(source, "a.tar"))
        assert [(member.name, member.data) for member in found] == members
        for member, (_, content) in zip(found, members, strict=True):
            assert member.size == len(content)
            assert data[member.offset : member.offset + member.size] == content


def test_folders_and_dots_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "raw" / "deep").mkdir(parents=True)
    (tmp_path / "raw" / "deep" / "1.txt").write_text("a")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "raw", arcname="./")
    assert [(member.name, member.data) for member in walk(tmp_path / "a.tar", "a")] == [("deep/1.txt", b"a")]


def test_large_members_are_cut() -> None:
    data = _tar([("a.jpg", b"x" * 5_000), ("b.jpg", b"y")])
    first, second = walk(io.BytesIO(data), "a", cap=100)
    assert (first.size, first.data, second.data) == (5_000, b"x" * 101, b"y")


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A member of 300 MB that is a hole in the file."""
    header = bytearray(_tar([("a.jpg", b"")])[:512])
    size = 300_000_000
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(header)
    os.truncate(path, 512 + size // 512 * 512 + 512 + 1024)
    member = next(walk(path, "a"))
    assert member.size == size and len(member.data) == 20_000_001


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_cut_anywhere_is_an_error(form: int) -> None:
    data = _tar([("a.jpg", b"x" * 700), ("a.json", b"{}"), ("b.jpg", b"y" * 512)], form, mtime=0.5)
    end = -(-len(data.rstrip(b"\0")) // 512) * 512  # where the mark of the end begins
    lengths = [*range(0, end + 512, 97), *range(0, end + 1, 512)]
    for length in lengths:
        if length < end + 512:
            with pytest.raises(UserError, match=r"^s\.tar: ends after \d+ bytes .* truncated; get the file again"):
                list(walk(io.BytesIO(data[:length]), "s.tar"))
    assert len(list(walk(io.BytesIO(data[: end + 512]), "s.tar"))) == 3


def test_flipped_bits_in_headers_are_errors_or_harmless() -> None:
    members = [("a.jpg", b"x" * 700), ("a.json", b"{}"), ("b.jpg", b"y" * 512)]
    data = _tar(members)
    headers = [0, 512 + 1024, 512 + 1024 + 1024]
    rng = random.Random(0)
    for _ in range(400):
        place = rng.choice(headers) + rng.randrange(512)
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << rng.randrange(8)
        try:
            found = [(member.name, member.data) for member in walk(io.BytesIO(spoiled), "a")]
        except UserError as error:
            assert "\n" not in str(error)
        else:  # in the checksum's own padding
            assert found == members


def test_random_bytes_never_crash() -> None:
    rng = random.Random(1)
    data = bytearray(_tar([("a.jpg", b"x" * 700), ("ä.json", b"{}")], tarfile.PAX_FORMAT, mtime=0.5))
    for _ in range(300):
        spoiled = bytearray(data)
        for _ in range(rng.randint(1, 5)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        start = rng.choice([0, 512, 1024])
        # A right checksum, so that the fields behind it are reached.
        spoiled[start + 148 : start + 156] = b" " * 8
        spoiled[start + 148 : start + 156] = b"%06o\0 " % sum(spoiled[start : start + 512])
        try:
            list(walk(io.BytesIO(spoiled), "a"))
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith("a: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(_tar([("a.jpg", b"x")])), "is gzip, not a plain tar; unpack it"),
        (gzip.compress(_tar([("a.jpg", os.urandom(9_000))])), "is gzip, not a plain tar; unpack it"),
        (b"BZh9" + bytes(600), "is bzip2"),
        (b"\xfd7zXZ\0" + bytes(600), "is xz"),
        (b"<html>" * 200, "at byte 0: not a tar header"),
        (_tar([("a.jpg", b"x")]) + _tar([("b.jpg", b"y")]), "data behind the end mark"),
        (_tar([("a.jpg", b"x"), ("a.jpg", b"y")]), "a.jpg: occurs twice"),
        (_tar([("a.jpg", b"x"), ("./a.jpg", b"y")]), "a.jpg: occurs twice"),
        (_tar([("../a.jpg", b"x")]), "'../a.jpg' is no name of a file below"),
        (_tar([("a/../../b.jpg", b"x")]), "is no name of a file below"),
        (_tar([("/etc/passwd.jpg", b"x")]), "'/etc/passwd.jpg' is no name of a file below"),
        (_tar([("a\\..\\b.jpg", b"x")]), "is no name of a file below"),
        (_tar([("a\n.jpg", b"x")]), r"'a\n.jpg' is no name"),
        (_tar([("a.pyd", b"x")]), "a.pyd is code"),
        (_tar([("a.meta.PKL", b"x")]), "a.meta.PKL is code"),
        (_tar([("model.pth", b"x")]), "model.pth is code"),
        (_odd("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'a.jpg' is a symbolic link"),
        (_odd("a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg"), "'a.jpg' is a hard link"),
        (_odd("a.jpg", type=tarfile.CHRTYPE), "'a.jpg' is a character device"),
        (_odd("a.jpg", type=tarfile.BLKTYPE), "'a.jpg' is a block device"),
        (_odd("a.jpg", type=tarfile.FIFOTYPE), "'a.jpg' is a pipe"),
        (_odd("a.jpg", type=tarfile.GNUTYPE_SPARSE), "'a.jpg' is a sparse file"),
        (_odd("a.jpg", type=b"Z"), "a member of the unknown kind"),
    ],
)
def test_refusals(data: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        list(walk(io.BytesIO(data), "s.tar"))
    assert message in str(caught.value) and str(caught.value).startswith("s.tar: ") and "\n" not in str(caught.value)


def test_names_that_are_not_utf8_are_errors() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("ä.jpg"))
    with pytest.raises(UserError, match="is not UTF-8"):
        list(walk(io.BytesIO(buffer.getvalue()), "s.tar"))


def test_pax_headers_that_lie() -> None:
    def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
        content = b"".join(_record(key, value) for key, value in records.items())
        return _odd("p", type=kind, size=len(content))[:512] + content.ljust(-(-len(content) // 512) * 512, b"\0")

    good = _tar([("a.jpg", b"x")])
    assert next(walk(io.BytesIO(pax({"path": "b.jpg", "comment": "é"}) + good), "a")).name == "b.jpg"
    for records, kind, message in [
        ({"path": "../b.jpg"}, b"x", "is no name of a file below"),
        ({"path": "b.jpg"}, b"g", "a global header"),
        ({"size": "-5"}, b"x", "not a number"),
        ({"GNU.sparse.major": "1"}, b"x", "a sparse file"),
        ({"size": "9" * 17}, b"x", "truncated"),
    ]:
        with pytest.raises(UserError, match=message):
            list(walk(io.BytesIO(pax(records, kind) + good), "a"))
    with pytest.raises(UserError, match="an extended header of 70000 bytes"):
        list(walk(io.BytesIO(_odd("p", type=b"x", size=70_000)[:512] + bytes(90_000)), "a"))


def _record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body
