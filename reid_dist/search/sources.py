"""What there is to index: a folder of images, a shard set, or a list of video frames.

A folder may hold `metadata.csv` with the columns file (relative to the folder), person, camera, date; each but the
first may be missing or empty. A list of frames is a text file with one image file in each line, or a CSV file with the
column file and any of person, camera, date, time (seconds); its files are relative to the list.
"""

import csv
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reid_dist.data.pictures import SUFFIXES
from reid_dist.data.reader import ShardSet
from reid_dist.data.remote import is_remote
from reid_dist.data.sample import INDEX_NAME, MANIFEST_NAME
from reid_dist.errors import UserError
from reid_dist.search.entries import Entry, date_number

METADATA_FILE = "metadata.csv"
# Pictures that are not read: left out without a word, they would be missed too late.
_OTHER_PICTURES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".raw", ".dng", ".cr2", ".nef", ".arw")
_FOLDER_COLUMNS = frozenset({"file", "person", "camera", "date"})
_FRAME_COLUMNS = _FOLDER_COLUMNS | {"time"}


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        entries: in an order that does not depend on the file system; no file twice.
        notes: what a person should be told, such as pictures of formats that are not read.
    """

    entries: list[Entry]
    notes: list[str]


def list_source(source: str) -> Listing:
    """The photographs of a source, none of them opened.

    Raises:
        UserError: there are none, a file of a list is missing, or metadata are wrong.
    """
    path = Path(source)
    if is_remote(source):
        raise UserError(f"{path}: is not on this machine; copy the shards here first")
    if path.is_file():
        listing = _frames(path)
    elif not path.is_dir():
        raise UserError(f"{source}: no such folder or list; name a folder of images, a shard set or a list of frames")
    elif (path / MANIFEST_NAME).is_file() and (path / INDEX_NAME).is_file():
        listing = Listing(list(_shard_set(path)), [])
    else:
        listing = _folder(path)
    if not listing.entries:
        raise UserError("; ".join([f"{source}: holds no image ({', '.join(SUFFIXES)})", *listing.notes]))
    return listing


def _folder(root: Path) -> Listing:
    root = Path(os.path.abspath(root))  # without "..": one photograph has one name
    files, others = list[Path](), Counter[str]()
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders.sort()
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                files.append(Path(folder) / name)
            elif suffix in _OTHER_PICTURES:
                others[suffix] += 1
    notes = []
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"left out, as they are not read: {kinds}; convert them to JPEG, PNG or WebP")
    known = _rows(root / METADATA_FILE, _FOLDER_COLUMNS) if (root / METADATA_FILE).is_file() else {}
    entries = [replace(known.pop(str(file), Entry(str(file), "")), version=_version(file)) for file in files]
    if known:
        notes.append(f"{root / METADATA_FILE}: names {len(known)} files that are not there, first {next(iter(known))}")
    return Listing(entries, notes)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); change its rights or move it elsewhere")


def _frames(path: Path) -> Listing:
    if path.suffix.lower() == ".csv":
        entries = _rows(path.absolute(), _FRAME_COLUMNS)
    else:
        lines = [line.strip() for line in _text(path).splitlines()]
        files = [os.path.normpath(path.absolute().parent / line) for line in lines if line]
        entries = {file: Entry(file, "") for file in files}
    for entry in entries.values():
        if not Path(entry.file).is_file():
            raise UserError(f"{path}: {entry.file}: no such file; correct the list")
    return Listing([replace(entry, version=_version(Path(entry.file))) for entry in entries.values()], [])


def _shard_set(path: Path) -> Iterator[Entry]:
    shards = ShardSet(path)
    for row in shards.rows().tolist():
        sample = shards.index[row]
        camera = None if sample["camid"] < 0 else str(sample["camid"])
        yield Entry(
            file=f"{shards.location}::{shards.key(row)}",
            version=f"{int(sample['image_digest']):016x}",
            person=shards.identities[int(sample["pid"])],
            camera=camera,
            shards=shards.location,
            row=row,
        )


def _version(file: Path) -> str:
    """Changes when the file does. A link to nowhere has one too: it counts as unreadable when it is read."""
    try:
        found = file.stat()
    except OSError:
        return "unreadable"
    return f"{found.st_size}-{found.st_mtime_ns}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; name a folder of images, a shard set or a list of frames") from None


def _rows(path: Path, columns: frozenset[str]) -> dict[str, Entry]:
    """Entries of a CSV file by absolute file name, without versions."""
    reader = csv.DictReader(_text(path).splitlines(), strict=True)
    entries = dict[str, Entry]()
    try:
        names = reader.fieldnames or []
        if "file" not in names or not set(names) <= columns:
            allowed = ", ".join(sorted(columns))
            raise UserError(f"{path}: columns {', '.join(names)[:200]}; needs file and any of {allowed}")
        for row in reader:
            entry = _row(path, reader.line_num, row)
            if entries.setdefault(entry.file, entry) is not entry:
                raise UserError(f"{path}, line {reader.line_num}: {row['file']} is named twice")
    except csv.Error as error:
        raise UserError(f"{path}, line {max(1, reader.line_num)}: not CSV ({error})") from None
    return entries


def _row(path: Path, line: int, row: dict[str, str | None]) -> Entry:
    if None in row or not row["file"]:
        raise UserError(f"{path}, line {line}: {'more values than columns' if None in row else 'no file'}")
    known = {key: value.strip() for key, value in row.items() if value and value.strip()}
    time = None
    try:
        if "date" in known:
            date_number(known["date"])
        if "time" in known:
            time = float(known["time"])
            if not math.isfinite(time):
                raise ValueError
    except UserError as error:
        raise UserError(f"{path}, line {line}: {error}") from None
    except ValueError:
        raise UserError(f'{path}, line {line}: time "{known["time"][:40]}" is no number of seconds') from None
    file = os.path.normpath(path.parent / known["file"])
    return Entry(file, "", known.get("person"), known.get("camera"), known.get("date"), time)
