"""One pass over a tar from anywhere: every member is checked, none is extracted, nothing in it is ever run.

The standard library's reader follows links, opens gzip under the name .tar and takes a file that ends early for
complete; a data set must not lose samples that way, so the few fields that matter are read here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from reid_dist.data.sample import COMPRESSED, EXECUTABLE, MAX_IMAGE_BYTES
from reid_dist.errors import UserError

BLOCK = 512

_REGULAR, _FOLDER, _PAX, _PAX_GLOBAL, _LONG_NAME = b"0\0", b"5", b"x", b"g", b"L"
_REFUSED_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"K": "a link",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_MAX_HEADER_BYTES = 64 * 1024
_AGAIN = "get the file again"


class Member(NamedTuple):
    """A regular file inside a tar.

    Attributes:
        name: with slashes, without a leading "./".
        offset: of the content inside the tar, bytes.
        size: of the content, bytes.
        data: the content; cut to `cap` + 1 bytes when it is larger than that.
    """

    name: str
    offset: int
    size: int
    data: bytes


def walk(source: Path | IO[bytes], name: str, cap: int = MAX_IMAGE_BYTES) -> Iterator[Member]:
    """The members of a tar in order, read once from its first to its last byte; it need not be seekable.

    Folders are passed over. A tar that is damaged or holds what no shard needs ends the walk with an error, so that
    no sample is lost without a word; contents (images, JSON) are the caller's to check.

    Args:
        source: the file, or an open binary stream at its start.
        name: what error messages call it.
        cap: most bytes of one member that are kept.

    Yields:
        The regular files.

    Raises:
        UserError: not a plain tar, ends early, a broken header, data behind the end; a link, device, pipe or sparse
            file; an absolute name, one with "..", backslash, control character or not UTF-8, one that occurs twice,
            or one that stands for code.
        OSError: the source cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield from walk(stream, name, cap)
        return
    reader = _Reader(source, name)
    names: set[str] = set()
    found = reader.header()
    while found is not None:
        kind, member, size = found
        if kind != _FOLDER:
            member = _checked_name(member, name)
            if member in names:
                raise UserError(f"{name}: {member}: occurs twice; write the shard again with every name once")
            names.add(member)
            offset = reader.position
            yield Member(member, offset, size, reader.content(size, cap, member))
        found = reader.header()
    reader.expect_zeros()


class _Reader:
    """A stream with its position, and the tar headers in it."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        self.position = 0

    def header(self) -> tuple[bytes, str, int] | None:
        """Kind, name and size of the next member, with what extended headers say of it; None at the end."""
        changes: dict[str, str] = {}
        while True:
            start = self.position
            block = self._take(BLOCK, "a header" if start else "its first header")
            if not block.strip(b"\0"):
                if changes:
                    raise self._broken(start, "an extended header without a member")
                return None
            self._check_sum(block, start)
            kind, size = block[156:157], self._number(block[124:136], start)
            if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME):
                if size > _MAX_HEADER_BYTES:
                    raise self._broken(start, f"an extended header of {size} bytes")
                content = self.content(size, size, "an extended header")
                changes.update(self._extended(kind, content, start))
                continue
            member = changes.get("path") or self._name_of(block, start)
            if kind in _REFUSED_KINDS or "sparse" in changes:
                what = _REFUSED_KINDS.get(kind, "a sparse file")
                raise UserError(f"{self._name}: {member[:200]!r} is {what}; write the shard again with plain files")
            if kind not in (b"0", b"\0", b"7", _FOLDER):
                raise self._broken(start, f"a member of the unknown kind {kind!r}")
            return kind, member, int(changes.get("size", size))

    def content(self, size: int, cap: int, member: str) -> bytes:
        """The next content up to cap + 1 bytes; its rest and padding are passed over."""
        kept = self._take(min(size, cap + 1), member)
        rest = size - len(kept) + -size % BLOCK
        while rest:
            rest -= len(self._take(min(rest, 1 << 20), member))
        return kept

    def expect_zeros(self) -> None:
        """Read to the end; what follows the mark of the end must be padding."""
        while block := self._stream.read(1 << 20):
            if block.strip(b"\0"):
                raise self._broken(self.position, "data behind the end mark (several tars joined to one file?)")
            self.position += len(block)

    def _take(self, size: int, what: str) -> bytes:
        parts: list[bytes] = []
        missing = size
        while missing:
            part = self._stream.read(missing)
            if not part:
                if not self.position:
                    self._check_magic(b"".join(parts))
                at = self.position + size - missing
                raise UserError(f"{self._name}: ends after {at} bytes inside or before {what}: truncated; {_AGAIN}")
            parts.append(part)
            missing -= len(part)
        self.position += size
        return b"".join(parts)

    def _check_sum(self, block: bytes, start: int) -> None:
        stored = block[148:156].strip(b" \0")
        if re.fullmatch(rb"[0-7]{1,8}", stored) is None or int(stored, 8) != sum(block) - sum(block[148:156]) + 256:
            if not start:
                self._check_magic(block)
            raise self._broken(start, "not a tar header")

    def _check_magic(self, beginning: bytes) -> None:
        for magic, kind in COMPRESSED.items():
            if beginning.startswith(magic):
                raise UserError(f"{self._name}: is {kind}, not a plain tar; unpack it to a .tar first")

    def _number(self, text: bytes, start: int) -> int:
        digits = text.strip(b" \0")
        if text[0] == 0x80:  # the base-256 form of sizes above 8 GB
            return int.from_bytes(text[1:], "big")
        if re.fullmatch(rb"[0-7]*", digits) is None:
            raise self._broken(start, "a size that is not a number")
        return int(digits or b"0", 8)

    def _name_of(self, block: bytes, start: int) -> str:
        name = block[:100].split(b"\0", 1)[0]
        prefix = block[345:500].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0" and prefix:
            name = prefix + b"/" + name
        return self._text(name, start)

    def _extended(self, kind: bytes, content: bytes, start: int) -> dict[str, str]:
        if kind == _LONG_NAME:
            return {"path": self._text(content.split(b"\0", 1)[0], start)}
        records = dict(self._pax_records(content, start))
        found = {key: self._text(records[key.encode()], start) for key in ("path", "size") if key.encode() in records}
        if kind == _PAX_GLOBAL and found:
            raise self._broken(start, "a global header that names or sizes all members")
        if any(key.startswith(b"GNU.sparse") for key in records):
            found["sparse"] = ""
        if not re.fullmatch(r"[0-9]{1,18}", found.get("size", "0")):
            raise self._broken(start, "a size that is not a number")
        return found

    def _pax_records(self, content: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
        while content.strip(b"\0"):
            match = re.match(rb"([0-9]{1,5}) ([^=]{1,200})=", content)
            length = int(match[1]) if match else 0
            if match is None or length > len(content) or length <= match.end() or content[length - 1] != 0x0A:
                raise self._broken(start, "a malformed extended header")
            yield match[2], content[match.end() : length - 1]
            content = content[length:]

    def _text(self, name: bytes, start: int) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(start, f"the name {name[:100]!r} is not UTF-8") from None

    def _broken(self, start: int, what: str) -> UserError:
        return UserError(f"{self._name}: at byte {start}: {what}; {_AGAIN}, or leave it out")


def _checked_name(member: str, name: str) -> str:
    """The name without "./", when it is a path inside and no code.

    Raises:
        UserError: it is not.
    """
    plain = re.sub(r"^(\./)+", "", member)
    parts = plain.split("/")
    if "" in parts or ".." in parts or re.search(r"[\\\x00-\x1f\x7f]", plain):
        raise UserError(f"{name}: {member[:200]!r} is no name of a file below a folder; write the tar again without it")
    if plain.rpartition(".")[2].lower() in EXECUTABLE:
        raise UserError(f"{name}: {plain[:200]} is code (a pickle, say), not data; write the tar without such members")
    return plain
