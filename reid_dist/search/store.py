"""Writing an index: whole or not at all, by one process at a time, with nothing of the former one left beside it.

What lies beside an index has a hidden name (files.beside). The new index is written to `partial`, flushed, and renamed
in place of the `old` one (files.replace_folder). What a kill leaves of these two holds vectors that were perhaps to be
deleted: the next command that changes the index removes them before anything else. `work` holds the chunks of an
indexing that is under way. `lock` is an empty file that stays: removed, it would let two processes lock two files of
one name.

Shape suffixes: N photographs, B block, D features.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.data.transforms import decoder_name
from reid_dist.errors import UserError
from reid_dist.files import aside, beside, content_sha256, flush, replace_folder, write_json
from reid_dist.search.entries import Entry, write_entries
from reid_dist.search.index import FORMAT_VERSION, MANIFEST_FILE, VECTORS_FILE, Half, PhotoIndex, read_manifest
from reid_dist.search.lists import LISTS_FILE, build_lists, extend_lists

_PACKAGES = ("reid_dist", "torch", "numpy", "pillow", "faiss-cpu")


def work_folder(folder: Path) -> Path:
    """Where chunks of an indexing that is under way lie."""
    return beside(folder, "work")


def _partial(folder: Path) -> Path:
    return beside(folder, "partial")


@contextmanager
def changing(folder: Path, create: bool = False) -> Iterator[Path]:
    """Only one process changes an index; what a killed one left is put in order first.

    Gives the folder itself: a link to it would be replaced, and what it leads to would stay.

    Raises:
        UserError: another one does, a folder has the name that is no index, or there is none and none is to be made.
    """
    folder = Path(os.path.realpath(folder))
    if create:
        folder.parent.mkdir(parents=True, exist_ok=True)
    elif not (aside(folder) / MANIFEST_FILE).is_file() and not work_folder(folder).exists():
        read_manifest(folder)
    if folder.exists() and not (folder / MANIFEST_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no index; choose another name")
    with beside(folder, "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is changing it; wait until it has finished") from None
        recover(folder)
        yield folder


def recover(folder: Path) -> None:
    """Puts in order what a killed process left; the caller holds the lock."""
    if not (folder / MANIFEST_FILE).is_file() and (aside(folder) / MANIFEST_FILE).is_file():
        aside(folder).rename(folder)  # killed between the two renames: nothing was changed yet
    remove(_partial(folder))
    remove(aside(folder))


def remove(folder: Path) -> None:
    """Removes a folder; unlike `shutil.rmtree(ignore_errors=True)` it fails where something stays."""
    if folder.exists():
        shutil.rmtree(folder)


def write_index(
    folder: Path,
    parts: Iterable[tuple[Sequence[Entry], Half]],
    total: int,
    settings: dict[str, Any],
    former: PhotoIndex | None = None,
) -> int:
    """Writes an index in place of the one that has the name; inside `changing`.

    Args:
        folder: of the index.
        parts: entries with their vectors, in order, taken one after the other.
        total: how many rows there are in all parts.
        settings: what the manifest says besides files and versions: the model, thresholds.
        former: index whose rows are the first of these; its lists are extended instead of trained anew.

    Returns:
        How many photographs there are.

    Raises:
        OSError: the disk is full or the like; the former index is untouched.
    """
    partial = _partial(folder)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        lists = _write_files(partial, parts, total, int(settings["model"]["features"]), former)
        files = sorted(path.name for path in partial.iterdir())
        manifest = {
            "format_version": FORMAT_VERSION,
            "photographs": total,
            **settings,
            **({"lists": lists} if lists else {}),
            "decoder": decoder_name(),
            "versions": {name: _version(name) for name in _PACKAGES},
            "files": {name: content_sha256(partial / name) for name in files},
        }
        for name in files:
            flush(partial / name)
        write_json(partial / MANIFEST_FILE, manifest)
        replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its space back
        raise
    remove(aside(folder))  # `replace_folder` does not say when it could not
    return total


def _write_files(
    partial: Path, parts: Iterable[tuple[Sequence[Entry], Half]], total: int, features: int, former: PhotoIndex | None
) -> dict[str, Any]:
    """All files but the manifest; returns what that says of the lists, nothing where there are none."""
    entries = list[Entry]()
    header = {"descr": "<f2", "fortran_order": False, "shape": (total, features)}
    with (partial / VECTORS_FILE).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for some, vectors_BD in parts:
            file.write(np.ascontiguousarray(vectors_BD, dtype="<f2").tobytes())
            entries += some
    if len(entries) != total:
        raise RuntimeError(f"search: {len(entries)} entries, not {total}")
    write_entries(partial, entries)
    # Read through a map, written through a file: a full disk is an error then, and not the end of the process.
    vectors_ND = np.load(partial / VECTORS_FILE, mmap_mode="r", allow_pickle=False)
    if former is None:
        return build_lists(vectors_ND, partial / LISTS_FILE)
    return extend_lists(vectors_ND, former.manifest["lists"], former.folder / LISTS_FILE, partial / LISTS_FILE)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
