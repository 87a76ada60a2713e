"""Which tars a location stands for: a folder, a pattern, a list or a single tar."""

import os
import re
from pathlib import Path

from reid_dist.data.remote import check_location, expand_ranges, is_remote, read_file, shown_location
from reid_dist.data.sample import MANIFEST_NAME
from reid_dist.errors import UserError

_MAX_LIST_BYTES = 256 << 20


def tar_locations(location: str) -> list[str]:
    """Every tar that a location stands for, those on this machine checked to be there.

    Args:
        location: as `check_location` gives it: a folder, a .tar with number ranges in braces, or a list (.txt) of
            such, one a line, relative to the list.

    Raises:
        UserError: no tars, a missing one, one named twice, or a pattern or scheme that is not read.
    """
    if os.path.isdir(location) and not is_remote(location):
        found = sorted(path for path in Path(location).iterdir() if path.suffix == ".tar" and path.name[0] != ".")
        if not found:
            raise UserError(f"{location}: holds neither {MANIFEST_NAME} nor .tar files; check data.train")
        tars = [str(path) for path in found]
    elif _path(location).endswith(".txt"):
        tars = [tar for line in _list_lines(location) for tar in _expand(line)]
        if is_remote(location) and not all(map(is_remote, tars)):
            raise UserError(f"{shown_location(location)}: names local files; a list behind a URL may name URLs only")
    else:
        tars = _expand(location)
    for tar in tars:
        if not is_remote(tar) and not os.path.isfile(tar):
            raise UserError(f"{tar}: no such tar; correct the name or pattern {location}")
    twice = len(tars) - len(set(tars))
    if twice:
        raise UserError(f"{shown_location(location)}: names {twice} tars more than once; name each once")
    return tars


def _list_lines(location: str) -> list[str]:
    """Lines of a list of tars, paths relative to the list's folder."""
    try:
        data = read_file(location, _MAX_LIST_BYTES) if is_remote(location) else _small_file(Path(location))
        lines = data.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{location}: the list of tars cannot be read ({reason}); write one tar a line") from None
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise UserError(f"{shown_location(location)}: names no tars; write one a line")
    folder = _path(location).rpartition("/")[0] or "."
    return [check_location(name) if _is_whole(name) else check_location(f"{folder}/{name}") for name in names]


def _path(location: str) -> str:
    """A location without the query of a URL."""
    return location.partition("?")[0] if is_remote(location) else location


def _small_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_LIST_BYTES)


def _is_whole(name: str) -> bool:
    return name.startswith("/") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) is not None


def _expand(pattern: str) -> list[str]:
    if not _path(pattern).endswith(".tar"):
        raise UserError(f"{shown_location(pattern)}: no folder, .tar or list (.txt) of that name; check data.train")
    return expand_ranges(pattern)
