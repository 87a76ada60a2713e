"""Making an index, adding to it, and deleting from it.

Shape suffixes: N photographs, D features.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.errors import UserError
from reid_dist.files import write_json
from reid_dist.search.encoding import encode_entries, read_chunk
from reid_dist.search.entries import Entry, Filter, Rows
from reid_dist.search.index import MANIFEST_FILE, Half, PhotoIndex
from reid_dist.search.lists import may_extend
from reid_dist.search.pictures import is_gone
from reid_dist.search.sources import Listing
from reid_dist.search.store import changing, remove, work_folder, write_index
from reid_dist.trained import TrainedModel

_BLOCK = 8192


@dataclass(frozen=True)
class Added:
    """What an indexing did.

    Attributes:
        new: photographs that were encoded and are in the index now.
        changed: of them, those whose file had changed.
        kept: photographs that were in the index before and are still.
        bad: photographs left out because they are unreadable.
    """

    new: int
    changed: int
    kept: int
    bad: int


def add(
    models: Sequence[TrainedModel], listing: Listing, folder: Path, max_bad_fraction: float = 0.0, threads: int = 2
) -> Added:
    """Makes an index, or adds to it what is new; what it knows of the others is brought up to date.

    Args:
        models: the same model on each device.
        listing: of a source.
        folder: of the index.
        max_bad_fraction: share of the source's photographs that may be unreadable.
        threads: that decode.

    Raises:
        UserError: the index was made with another model, or photographs are unreadable.
        OSError: the disk is full; the index is what it was, and what was encoded is kept for the next call.
    """
    with changing(folder, create=True) as folder:
        old = PhotoIndex.open(folder) if (folder / MANIFEST_FILE).is_file() else None
        if old is not None and old.digest != models[0].digest:
            raise UserError(
                f"{folder}: was made with another model (sha256 {old.digest[:12]}, not {models[0].digest[:12]});"
                " choose another name, or remove it to build it anew"
            )
        known = {} if old is None else {entry.file: (row, entry) for row, entry in enumerate(old.entries)}
        wanted = [entry for entry in listing.entries if not _is_known(entry, known)]
        allowed = int(max_bad_fraction * len(listing.entries))
        chunks = encode_entries(models, wanted, work_folder(folder), allowed, threads)
        found = {entry.file for path in chunks for entry in _chunk(path)[0]}
        changed = [known[file][0] for file in sorted(found & known.keys())]
        former = [] if old is None else _refreshed(old, listing, set(changed))
        rows = np.setdiff1d(np.arange(len(known)), changed)
        total = len(rows) + sum(len(_chunk(path)[0]) for path in chunks)
        extended = old is not None and not changed and may_extend(old.manifest.get("lists"), total)

        def parts() -> Iterator[tuple[Sequence[Entry], Half]]:
            if old is not None:
                yield from _stored(old, rows, former)
            for path in chunks:
                yield _chunk(path)

        if total == 0:
            remove(work_folder(folder))
            raise UserError(f"{folder}: no photograph could be read; nothing was written")
        settings = _settings(models[0], old)
        if found or former != _entries(old, rows):
            write_index(folder, parts(), total, settings, old if extended else None)
        elif old is not None and settings["model"] != old.manifest["model"]:  # it moved
            write_json(folder / MANIFEST_FILE, {**old.manifest, **settings})
        remove(work_folder(folder))
        return Added(len(found), len(changed), len(rows), len(wanted) - len(found))


def delete(
    folder: Path, where: Filter, files: Sequence[str] = (), missing: bool = False, dry: bool = False
) -> list[Entry]:
    """Deletes photographs from an index, with all that was derived from them alone.

    What an unfinished indexing has encoded goes first, whatever it is of: it may hold what is to be deleted. The index
    is then written anew from what remains, its lists trained anew: its files (but for what the manifest says of
    thresholds) are those of an index that never held what was deleted.

    Args:
        folder: of the index.
        where: what photographs must be to be deleted.
        files: with some, a photograph must also be one of these.
        missing: a photograph must also be gone from where it was.
        dry: delete nothing.

    Returns:
        What was deleted.

    Raises:
        UserError: nothing matches, no condition is given, or there is no index.
        OSError: the disk is full or the like; nothing was deleted.
    """
    if where.empty and not files and not missing:
        raise UserError("delete: says not what; give --file, --person, --camera, --since, --until or --missing")
    with changing(folder) as folder:
        _drop_unfinished(folder, dry)
        index = PhotoIndex.open(folder)
        gone = _matching(index, where, files, missing)
        entries = [index.entries[int(row)] for row in gone]
        if not entries:
            raise UserError(f"{folder}: nothing deleted, no photograph is what was said; it holds {len(index.entries)}")
        if dry:
            return entries
        rows = np.setdiff1d(np.arange(len(index.entries)), gone)
        parts = _stored(index, rows, _entries(index, rows))
        write_index(folder, parts, len(rows), _settings(None, index))
        return entries


def _drop_unfinished(folder: Path, dry: bool) -> None:
    work = work_folder(folder)
    if work.exists():
        if not dry:
            remove(work)
        done = "would be" if dry else "was"
        print(f"note: {work}: what an unfinished indexing had encoded {done} removed", file=sys.stderr)


def _matching(index: PhotoIndex, where: Filter, files: Sequence[str], missing: bool) -> Rows:
    rows = index.entries.rows(where)
    if not files and not missing:
        return rows
    named = {os.path.abspath(file) for file in files} | set(files)
    return np.array([row for row in rows.tolist() if _matches(index.entries[row], named, missing)], dtype=np.int64)


def _matches(entry: Entry, named: set[str], missing: bool) -> bool:
    if named and entry.file not in named:
        return False
    return not missing or is_gone(entry)


def _is_known(entry: Entry, known: dict[str, tuple[int, Entry]]) -> bool:
    found = known.get(entry.file)
    return found is not None and found[1].version == entry.version


def _chunk(path: Path) -> tuple[list[Entry], Half]:
    chunk = read_chunk(path)
    if chunk is None:
        raise OSError(f"{path}: cannot be read again; start the indexing again")
    return chunk.entries, chunk.vectors_BD


def _refreshed(old: PhotoIndex, listing: Listing, changed: set[int]) -> list[Entry]:
    """What the source says now of photographs that stay; where it says no date, that of the file counts."""
    listed = {entry.file: entry for entry in listing.entries}
    entries = []
    for row, entry in enumerate(old.entries):
        if row not in changed:
            now = listed.get(entry.file)
            if now is not None:
                entry = replace(now, version=entry.version, taken=entry.taken, date=now.date or entry.taken)
            entries.append(entry)
    return entries


def _entries(index: PhotoIndex | None, rows: Rows) -> list[Entry]:
    return [] if index is None else [index.entries[row] for row in rows.tolist()]


def _stored(index: PhotoIndex, rows: Rows, entries: Sequence[Entry]) -> Iterator[tuple[Sequence[Entry], Half]]:
    """Stored vectors of some rows with their entries, block by block."""
    for begin in range(0, len(rows), _BLOCK):
        end = begin + _BLOCK
        yield entries[begin:end], index.vectors_ND[rows[begin:end]]


def _settings(model: TrainedModel | None, old: PhotoIndex | None) -> dict[str, Any]:
    """The part of the manifest that does not depend on the photographs."""
    settings: dict[str, Any] = {}
    if model is not None:
        path = str(model.folder.absolute())
        settings["model"] = {"path": path, "digest": model.digest, "features": model.features}
        settings["model"]["stage"] = model.manifest.get("stage")
    elif old is not None:
        settings["model"] = old.manifest["model"]
    if old is not None and "thresholds" in old.manifest:
        settings["thresholds"] = old.manifest["thresholds"]
    return settings
