"""Tars and images that no data set should hold, made by hand: Python's tarfile would refuse to write most of them."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

BLOCK = 512
END = bytes(2 * BLOCK)


def jpeg(number: int, height: int = 20, width: int = 10) -> bytes:
    """A noise image that depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def png_bomb(width: int = 10_000, height: int = 10_000) -> bytes:
    """A PNG of 100 million black pixels in about 100 KB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    line = bytes(1 + width)
    rows = b"".join([packer.compress(line * 100) for _ in range(height // 100)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def payload(path: Path) -> bytes:
    """A pickle that creates a file."""
    return pickle.dumps(Payload(path))


def member(name: str, content: bytes = b"", kind: bytes = b"0", link: str = "") -> bytes:
    """One tar member, header and padded content, whatever its name and kind."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % BLOCK)


def record(number: int, image: bytes, dataset: str = "tiny", **changes: Any) -> bytes:
    """A Sample's JSON for an image, with some of its fields changed."""
    facts = {
        "v": 1,
        "dataset": dataset,
        "pid": f"{dataset}:{number // 2}",
        "camid": 0,
        "split": "train",
        "role": "train",
        "captions": [f"picture {number}"],
        "source": f"{number}.jpg",
        "width": 10,
        "height": 20,
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    return json.dumps({**facts, **changes}).encode()


def pairs(count: int, form: str = "ours", start: int = 0) -> list[bytes]:
    """The members of some good samples: ours (jpg, json) or those of img2dataset (jpg, txt, json)."""
    members = []
    for number in range(start, start + count):
        image, key = jpeg(number), f"{number:09d}"
        members.append(member(f"{key}.jpg", image))
        if form == "img2dataset":
            members.append(member(f"{key}.txt", f"picture {number}".encode()))
            facts = {"caption": f"picture {number}", "key": key, "status": "success", "width": 10, "height": 20}
            members.append(member(f"{key}.json", json.dumps(facts).encode()))
        else:
            members.append(member(f"{key}.json", record(number, image)))
    return members


def gzipped(tar: bytes) -> bytes:
    """The same, compressed; always the same bytes."""
    return gzip.compress(tar, mtime=0)


class Bad(NamedTuple):
    """One way in which a tar of pairs can be bad.

    Attributes:
        members: the third pair's members in its stead; None: the whole tar is another one.
        names: what every message must hold of it: its key, or where nothing has a key, the kind.
        whole: turns the bytes of the tar into others.
    """

    members: Callable[[Path], list[bytes]] | None
    names: str
    whole: Callable[[bytes], bytes] | None = None


KEY = "000000002"


def _pair(image: bytes = b"", text: bytes = b"a caption", facts: bytes | None = None) -> list[bytes]:
    members = [member(f"{KEY}.jpg", image or jpeg(2)), member(f"{KEY}.txt", text)]
    return members if facts is None else [members[0], member(f"{KEY}.json", facts)]


def _odd(name: str, kind: bytes = b"0", link: str = "") -> Callable[[Path], list[bytes]]:
    content = b"" if kind in b"12346" else jpeg(2)
    return lambda mark: [member(name, content, kind, link), member(f"{KEY}.txt", b"a caption")]


def _pickled(suffix: str) -> Callable[[Path], list[bytes]]:
    return lambda mark: [*_pair(), member(f"{KEY}.{suffix}", payload(mark))]


# Tars of pairs (jpg and txt, or json) as others make them. None of these may be read without a word, none may run.
BAD_TARS: dict[str, Bad] = {
    "truncated in an image": Bad(None, "", lambda tar: tar[: tar.index(f"{KEY}.jpg".encode()) + 700]),
    "truncated between samples": Bad(None, "", lambda tar: tar[: tar.index(f"{KEY}.jpg".encode())]),
    "header overwritten": Bad(None, "", lambda tar: tar.replace(f"{KEY}.jpg".encode(), b"\0" * 13, 1)),
    "gzip": Bad(None, "gzip", gzipped),
    "bzip2": Bad(None, "bzip2", bz2.compress),
    "xz": Bad(None, "xz", lzma.compress),
    "empty file": Bad(None, "", lambda tar: b""),
    "two tars in one": Bad(None, "", lambda tar: tar + tar),
    "image without text": Bad(lambda mark: _pair()[:1], KEY),
    "text without image": Bad(lambda mark: _pair()[1:], KEY),
    "interleaved": Bad(
        lambda mark: [_pair()[0], member("000000009.jpg", jpeg(9)), _pair()[1], member("000000009.txt", b"x")], KEY
    ),
    "key twice": Bad(lambda mark: [*_pair(), *pairs(1, "img2dataset", 7)[:2], *_pair()], KEY),
    "member twice": Bad(lambda mark: [*_pair(), _pair()[1]], KEY),
    "two images": Bad(lambda mark: [*_pair(), member(f"{KEY}.png", jpeg(3))], KEY),
    "parent folder": Bad(_odd(f"../{KEY}.jpg"), KEY),
    "hidden parent folder": Bad(_odd(f"a/../../{KEY}.jpg"), KEY),
    "absolute name": Bad(_odd(f"/tmp/{KEY}.jpg"), KEY),
    "backslashes": Bad(_odd(f"..\\{KEY}.jpg"), KEY),
    "symbolic link": Bad(_odd(f"{KEY}.jpg", b"2", "/etc/passwd"), KEY),
    "hard link": Bad(_odd(f"{KEY}.jpg", b"1", "000000001.jpg"), KEY),
    "character device": Bad(_odd(f"{KEY}.jpg", b"3"), KEY),
    "block device": Bad(_odd(f"{KEY}.jpg", b"4"), KEY),
    "pipe": Bad(_odd(f"{KEY}.jpg", b"6"), KEY),
    "sparse": Bad(_odd(f"{KEY}.jpg", b"S"), KEY),
    "pickle": Bad(_pickled("pickle"), KEY),
    "pyd": Bad(_pickled("pyd"), KEY),
    "pth": Bad(_pickled("pth"), KEY),
    "pickle as an image": Bad(lambda mark: _pair(payload(mark)), KEY),
    "100 megapixels": Bad(lambda mark: _pair(png_bomb()), KEY),
    "no image": Bad(lambda mark: _pair(b"<html>not found</html>"), KEY),
    "caption not UTF-8": Bad(lambda mark: _pair(text=b"caf\xe9"), KEY),
    "caption of 1 MB": Bad(lambda mark: _pair(text=b"long " * 200_000), KEY),
    "empty caption": Bad(lambda mark: _pair(text=b" \n"), KEY),
    "json not UTF-8": Bad(lambda mark: _pair(facts=b'{"caption": "caf\xe9"}'), KEY),
    "json with a number": Bad(lambda mark: _pair(facts=b'{"caption": 7}'), KEY),
    "json with a list": Bad(lambda mark: _pair(facts=b'{"caption": ["a"]}'), KEY),
    "json is a list": Bad(lambda mark: _pair(facts=b'["caption"]'), KEY),
    "json cut": Bad(lambda mark: _pair(facts=b'{"caption": "a'), KEY),
    "json very deep": Bad(lambda mark: _pair(facts=b'{"caption":' + b"[" * 30_000 + b"]" * 30_000 + b"}"), KEY),
    "json of 1 MB": Bad(lambda mark: _pair(facts=json.dumps({"caption": "x" * 1_000_000}).encode()), KEY),
}


def bad_tar(bad: Bad, mark: Path) -> bytes:
    """Five pairs, the third of them bad; `mark` is the file that a payload would make."""
    good = [pairs(1, "img2dataset", number)[:2] for number in range(5)]
    if bad.members is not None:
        good[2] = bad.members(mark)
    tar = join([each for group in good for each in group])
    return bad.whole(tar) if bad.whole is not None else tar


def join(members: list[bytes]) -> bytes:
    """A tar of some members."""
    return b"".join(members) + END


class Ours(NamedTuple):
    """One way in which a shard set of ours can be bad although manifest and index vouch for it.

    Attributes:
        image: of the third sample, in its stead.
        changes: of the third sample's record.
        text: its record in its stead.
    """

    image: bytes | None = None
    changes: dict[str, Any] | None = None
    text: bytes | None = None


BAD_SAMPLES: dict[str, Ours] = {
    "no image": Ours(b"<html>not found</html>"),
    "truncated image": Ours(jpeg(2)[:-60]),
    "100 megapixels": Ours(png_bomb()),
    "21 MB image": Ours(jpeg(2) + bytes(21_000_000)),
    "record not UTF-8": Ours(text=record(2, jpeg(2)).replace(b"picture", b"pictur\xe9")),
    "record of 1 MB": Ours(changes={"captions": ["x" * 1_000_000]}),
    "captions is a text": Ours(changes={"captions": "one"}),
    "captions holds a number": Ours(changes={"captions": [3]}),
    "record is a list": Ours(text=b"[]"),
    "record cut": Ours(text=record(2, jpeg(2))[:-5]),
    "record very deep": Ours(text=b'{"v":' + b"[" * 30_000),
    "unknown field": Ours(changes={"command": "touch executed"}),
    "width is a text": Ours(changes={"width": "wide"}),
}


def write_ours(folder: Path, bad: Ours | None = None, count: int = 6, per_tar: int = 6) -> Path:
    """A set of ours with keys s000, s001, ...; manifest and index have the hashes of what is there."""
    from reid_dist.data.sample import INDEX_DTYPE, content_digest

    folder.mkdir()
    rows, shards = [], []
    for first in range(0, count, per_tar):
        tar = b""
        for number in range(first, min(first + per_tar, count)):
            image, text = jpeg(number), record(number, jpeg(number), folder.name)
            if number == 2 and bad is not None:
                image = image if bad.image is None else bad.image
                text = record(2, image, folder.name, **(bad.changes or {}))
                text = text if bad.text is None else bad.text.replace(b"tiny", folder.name.encode())
            head = member(f"s{number:03d}.jpg", image)
            offsets = len(tar) + BLOCK, len(tar) + len(head) + BLOCK
            tar += head + member(f"s{number:03d}.json", text)
            digests = content_digest(image), content_digest(text)
            rows.append((len(shards), offsets[0], len(image), offsets[1], len(text), *digests, number // 2, 0, 0, 0, 1))
        name = f"{folder.name}-{len(shards):06d}.tar"
        (folder / name).write_bytes(tar + END)
        digest = hashlib.sha256(tar + END).hexdigest()
        samples = min(per_tar, count - first)
        shards.append({"name": name, "sha256": digest, "bytes": len(tar + END), "samples": samples})
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=INDEX_DTYPE))
    (folder / "index.npy").write_bytes(buffer.getvalue())
    identities = (count + 1) // 2
    manifest = {
        "dataset": folder.name,
        "shards": shards,
        "identities": [f"{folder.name}:{number}" for number in range(identities)],
        "splits": {"train": {"images": count, "identities": identities, "captions": count, "cameras": 1}},
        "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
