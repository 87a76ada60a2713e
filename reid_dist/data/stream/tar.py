"""Samples of a tar as it passes by: adjacent members with one key, nothing extracted and nothing run.

webdataset's own iterator is not used on what comes from outside: it opens compressed files under the name .tar, passes
over links without a word, reads members of any size into memory, and takes a tar that ends early for complete.
"""

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from reid_dist.data.sample import COMPRESSED, EXECUTABLE, MAX_IMAGE_BYTES, MAX_JSON_BYTES
from reid_dist.errors import UserError

IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
TEXTS = frozenset({"json", "txt"})

_BLOCK = 512
_END = bytes(_BLOCK)
_MAX_EXTENDED = 1 << 20
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_NAME = re.compile(r"((?:[^/\\\x00-\x1f\x7f]+/)*[^/.\\\x00-\x1f\x7f]+)\.([^/\\\x00-\x1f\x7f]+)")


class BrokenShardError(UserError):
    """The rest of a shard cannot be read."""


class TarSample(NamedTuple):
    """Adjacent members with one key, or what is wrong with them.

    Attributes:
        ordinal: number of the sample in its tar, problems included.
        key: name of the members without extension.
        image: content of the image.
        text: content of the .json or .txt.
        is_json: which of the two `text` is.
        offset: of the image's content inside the tar, -1 without one.
        problem: why it is no sample, one phrase; empty when it is one.
    """

    ordinal: int
    key: str
    image: bytes
    text: bytes
    is_json: bool
    offset: int
    problem: str


class _Member(NamedTuple):
    name: str
    size: int
    offset: int
    problem: str


def tar_samples(file: IO[bytes], name: str, text: str = "txt") -> Iterator[TarSample]:
    """The samples of a tar in order, one pass from its first to its last byte.

    Args:
        file: open at its beginning; what is no part of a sample is passed over by `seek`.
        name: what error messages call it.
        text: extension that is taken where a sample has both: txt or json.

    Yields:
        One entry per sample and per problem.

    Raises:
        BrokenShardError: compressed, ends early, a broken header, or data behind the end.
    """
    seen: set[str] = set()
    group = _Group(0, "", file, text)
    for member in _members(file, name):
        key, extension = _split(member.name)
        if key != group.key:
            if group:
                yield group.sample(seen)
                group = _Group(group.ordinal + 1, key, file, text)
            else:
                group.key = key
        group.add(member, extension)
    if group:
        yield group.sample(seen)


class _Group:
    """Members that share a key, as they arrive."""

    def __init__(self, ordinal: int, key: str, file: IO[bytes], text: str) -> None:
        self.ordinal = ordinal
        self.key = key
        self._file = file
        self._preferred = text
        self._extensions: list[str] = []
        self._image = self._text = b""
        self._text_kind = self._problem = ""
        self._offset = -1

    def __bool__(self) -> bool:
        return bool(self._extensions)

    def add(self, member: _Member, extension: str) -> None:
        """Take the next member in, with its content when it is an image or a text."""
        if member.problem or not extension:
            self._problem = self._problem or member.problem or f"{member.name[:200]!r} is no name of a sample's file"
        elif extension in EXECUTABLE:
            self._problem = f".{extension} is code (a pickle, say), not data"
        elif extension in self._extensions:
            self._problem = f"it has two .{extension} members"
        elif extension in IMAGES:
            if self._offset >= 0:
                self._problem = "it has two images"
            self._offset = member.offset
            self._image = self._content(member, extension, MAX_IMAGE_BYTES)
        elif extension in TEXTS and self._text_kind != self._preferred:
            self._text_kind = extension
            self._text = self._content(member, extension, MAX_JSON_BYTES)
        self._extensions.append(extension)

    def _content(self, member: _Member, extension: str, cap: int) -> bytes:
        if member.size > cap:
            self._problem = f".{extension} has {member.size} bytes, more than the cap of {cap}"
            return b""
        return self._file.read(member.size)

    def sample(self, seen: set[str]) -> TarSample:
        """What came of it; `seen` are the keys of the samples before."""
        problem = self._problem
        if not problem and self.key in seen:
            problem = "its key occurs before: members of a sample must be adjacent and keys unique"
        if not problem and self._offset < 0:
            problem = f"half a sample: no image beside .{self._extensions[0]}"
        if not problem and not self._text_kind:
            problem = "half a sample: no .txt or .json beside its image"
        seen.add(self.key)
        return TarSample(
            self.ordinal, self.key, self._image, self._text, self._text_kind == "json", self._offset, problem
        )


def _split(name: str) -> tuple[str, str]:
    """Key and extension (the part after the first dot, in lower case); without extension when the name is hostile."""
    match = _NAME.fullmatch(name)
    if match is None or name.startswith("../") or "/../" in name:
        return name, ""
    return match[1], match[2].lower()


def _members(file: IO[bytes], name: str) -> Iterator[_Member]:
    """Headers of the members; the consumer may read the content, the file is at its beginning."""
    position = 0
    renamed: dict[str, str] = {}
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise _broken(name, position, "ends without the mark of its end: truncated", header)
        if header == _END:
            break
        _check_sum(header, name, position)
        kind, size = header[156:157], _number(header[124:136], name, position)
        content, position = position + _BLOCK, position + _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            renamed |= _extended(kind, _content(file, size, name, content), name, content)
            continue
        problem = _kind_problem(kind, renamed)
        if "size" in renamed:
            size = int(renamed["size"])
            position = content + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        path = renamed["path"] if "path" in renamed else _name(header)
        renamed = {}
        if kind != b"5":  # a folder holds nothing
            yield _Member(path.removeprefix("./"), size, content, problem)
    if renamed:
        raise _broken(name, position, "an extended header without a member")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise _broken(name, position, "data behind the mark of its end (several tars in one file?)")


def _content(file: IO[bytes], size: int, name: str, position: int) -> bytes:
    if size > _MAX_EXTENDED:
        raise _broken(name, position, f"an extended header of {size} bytes")
    data = file.read(size)
    if len(data) != size:
        raise _broken(name, position, "ends inside an extended header: truncated")
    return data


def _check_sum(header: bytes, name: str, position: int) -> None:
    try:
        right = int(header[148:156].strip(b" \0"), 8) == sum(header) - sum(header[148:156]) + 256
    except ValueError:
        right = False
    if not right:
        raise _broken(name, position, "not a tar header", header)


def _number(field: bytes, name: str, position: int) -> int:
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):  # the base-256 form included: no member of 8 GB belongs here
        raise _broken(name, position, "a size that is not an octal number")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    path = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        path = header[345:500].split(b"\0", 1)[0] + b"/" + path
    return path.decode("utf-8", "backslashreplace")


def _kind_problem(kind: bytes, renamed: dict[str, str]) -> str:
    if "sparse" in renamed:
        return "it is a sparse file"
    return "" if kind in (b"0", b"\0", b"7", b"5") else f"it is {_KINDS.get(kind, 'no plain file')}"


def _extended(kind: bytes, content: bytes, name: str, position: int) -> dict[str, str]:
    """What a PAX or GNU header says of the next member: path, size, sparse."""
    if kind == b"K":
        return {}
    if kind == b"L":
        return {"path": content.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")}
    found: dict[str, str] = {}
    while content.strip(b"\0"):
        match = re.match(rb"([0-9]{1,7}) ([^=\n]{1,200})=", content)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(content):
            raise _broken(name, position, "a malformed extended header")
        key, value = match[2], content[match.end() : length - 1].decode("utf-8", "backslashreplace")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = value
        content = content[length:]
    if kind == b"g" and found:
        raise _broken(name, position, "a global header that names or sizes all members")
    if not re.fullmatch(r"[0-9]{1,15}", found.get("size", "0")):
        raise _broken(name, position, "a size that is not a number")
    return found


def _broken(name: str, position: int, what: str, beginning: bytes = b"") -> BrokenShardError:
    if position == 0:
        for magic, kind in COMPRESSED.items():
            if beginning.startswith(magic):
                return BrokenShardError(f"{name}: is {kind}, not a plain tar; unpack it to a .tar first")
    return BrokenShardError(f"{name}: at byte {position}: {what}; get the file again, or leave it out")
