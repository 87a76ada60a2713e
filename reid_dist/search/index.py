"""An index of photographs on disk: vectors, what is known of each photograph, and the search in them.

A folder: `manifest.json` (the model's hash, versions, the sha256 of every other file), `vectors.npy` (fp16, a row for
each photograph), the entries (entries.py) and, above `FLAT_LIMIT` photographs, `lists.faiss` (lists.py). Below it every
vector is compared. Every score that leaves is computed from the stored vectors in fp32, whatever found the candidates.

Shape suffixes: N photographs, D features, C candidates.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from reid_dist.errors import UserError
from reid_dist.files import aside, content_sha256
from reid_dist.search.entries import COLUMNS_FILE, ENTRIES_FILE, NAMES_FILE, Entries, Entry, Filter, Rows
from reid_dist.search.lists import LISTS_FILE, flat_lists, read_lists
from reid_dist.search.pictures import entry_picture

FORMAT_VERSION = 1
MANIFEST_FILE, VECTORS_FILE = "manifest.json", "vectors.npy"
Vector = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]
Kind = Literal["text", "image", "both"]
_Identity = tuple[int, int, int]
_TRIES, _PAUSE = 10, 0.1  # to open an index that another process is changing; seconds between them
_NEEDED = (VECTORS_FILE, ENTRIES_FILE, COLUMNS_FILE, NAMES_FILE)
# A filter that leaves so few photographs compares them all, which is exact.
_FEW = 20_000
_BLOCK = 512  # rows that fit a cache, and so few that BLAS starts no threads, which take longer to wake


@dataclass(frozen=True)
class Hit:
    """A photograph that was found.

    Attributes:
        entry: what is known of it.
        score: cosine of the query's features and its own.
        row: its number in the index; `index.entries[row]` is the entry.
    """

    entry: Entry
    score: float
    row: int


def unknown(hits: Sequence[Hit], threshold: float | None) -> bool | None:
    """Whether what a query found best is of somebody unknown; None where nothing was calibrated."""
    return None if threshold is None else bool(hits) and hits[0].score < threshold


class PhotoIndex:
    """A whole index, checked against the hashes of its manifest; `PhotoIndex.open` reads one.

    What is open stays what it was: after `delete` or `index` in another process, `current` is False, and whoever keeps
    an index open must open it again.

    Attributes:
        folder: where it lies.
        manifest: what the index says of itself.
        entries: what is known of the photographs, by row.
    """

    def __init__(self, folder: Path, identity: _Identity | None) -> None:
        """Reads the files; `open` makes sure that they are of one index."""
        self.folder, self.manifest, self._identity = folder, read_manifest(folder), identity
        _check_files(folder, self.manifest)
        self.entries = Entries(folder)
        self.vectors_ND: Half = np.load(folder / VECTORS_FILE, mmap_mode="r", allow_pickle=False)
        if self.vectors_ND.dtype != np.float16 or self.vectors_ND.shape != (len(self.entries), self.features):
            raise UserError(f"{folder / VECTORS_FILE}: not the vectors of this index; build the index again")
        # Inverted lists now, before another index takes the place; a flat copy of the vectors when it is needed.
        with_lists = "lists" in self.manifest
        self._lists = read_lists(folder / LISTS_FILE, self.manifest["lists"]) if with_lists else None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "PhotoIndex":
        """Reads an index and compares every file with its hash, one or two seconds for a gigabyte.

        Args:
            folder: of the index.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = Path(folder)
        for _ in range(_TRIES):
            identity = _identity(path)
            try:
                index = cls(path, identity)
                if index.current:
                    return index
            except Exception:  # where another process changes it, files of two indexes are met, or for a moment none
                between = identity is None and aside(Path(os.path.realpath(path))).exists()
                if _identity(path) == identity and not between:
                    raise
            time.sleep(_PAUSE)
        read_manifest(path)
        raise UserError(f"{path}: another process is changing it; wait until it has finished")

    @property
    def features(self) -> int:
        """D."""
        return int(self.manifest["model"]["features"])

    @property
    def digest(self) -> str:
        """Hash of the weights that made the vectors."""
        return str(self.manifest["model"]["digest"])

    @property
    def model_path(self) -> str:
        """Where the model lay when the index was made."""
        return str(self.manifest["model"]["path"])

    @property
    def current(self) -> bool:
        """Whether the folder still holds this index, and not what a deletion or an addition made of it."""
        return _identity(self.folder) == self._identity

    def threshold(self, kind: Kind, weight: float = 0.5) -> float | None:
        """Score below which the best hit is of somebody unknown; None where nothing was calibrated.

        Args:
            kind: of the query.
            weight: of the sentence where the query is both.
        """
        found = self.manifest.get("thresholds", {}).get(kind)
        if found is None or (kind == "both" and weight != found["weight"]):
            return None
        return float(found["score"])

    def search(self, feature_D: npt.ArrayLike, k: int = 10, where: Filter | None = None) -> list[Hit]:
        """The photographs most like a query, best first; of equals the one indexed first.

        Args:
            feature_D: of the query; its length does not matter.
            k: how many; fewer where fewer pass.
            where: which photographs count.

        Raises:
            UserError: the features hold nan or inf.
            ValueError: they have another size than the index's, or k is not above 0.
        """
        query_D = self._query(feature_D)
        if k < 1:
            raise ValueError(f"k {k}: must be above 0")
        rows = None if where is None or where.empty else self.entries.rows(where)
        if not len(self.entries):
            return []
        few = rows is not None and len(rows) <= _FEW
        candidate_C = rows if few and rows is not None else self._candidates(query_D, k, rows)
        score_C = self.scores(query_D, candidate_C)
        order = np.lexsort((candidate_C, -score_C))[:k]
        return [Hit(self.entries[int(candidate_C[i])], float(score_C[i]), int(candidate_C[i])) for i in order]

    def scores(self, query_D: Vector, rows: Rows) -> Vector:
        """Cosines of a query of length 1 with the stored vectors of some rows, in fp32. Shape: (rows,)."""
        parts = [
            self.vectors_ND[rows[i : i + _BLOCK]].astype(np.float32) @ query_D for i in range(0, len(rows), _BLOCK)
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def thumbnail(self, entry: Entry, size: int = 256) -> Image.Image:
        """The photograph of an entry, upright, neither side longer than `size` pixels.

        Raises:
            UserError: the file is gone or does not decode.
        """
        image = entry_picture(entry, size)
        image.thumbnail((size, size), Image.Resampling.BICUBIC)
        return image

    def _query(self, feature_D: npt.ArrayLike) -> Vector:
        query_D = np.asarray(feature_D, dtype=np.float32)
        if query_D.shape != (self.features,):
            raise ValueError(f"a query must have shape ({self.features},), not {query_D.shape}")
        length = float(np.linalg.norm(query_D))
        if not np.isfinite(query_D).all() or length == 0:
            raise UserError("query: its features hold nan or inf, or are all 0; the model diverged in training")
        return query_D / length

    def _candidates(self, query_D: Vector, k: int, rows: Rows | None) -> Rows:
        if self._lists is None:
            self._lists = flat_lists(self.vectors_ND)
        return self._lists.candidates(query_D, k, rows)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        UserError: there is none, or this program does not read it.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        folder = Path(os.path.realpath(folder))
        old = f"; a deletion or addition was killed, rename {aside(folder)} back" if aside(folder).is_dir() else ""
        raise UserError(f"{folder}: no index; make one with `python launch/search.py index`{old}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format_version"]
        _ = (
            manifest["files"],
            manifest["model"]["digest"],
            manifest["model"]["path"],
            int(manifest["model"]["features"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error!r}); build the index again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version {version}; this program reads {FORMAT_VERSION}: build the index again")
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    needed = [*_NEEDED, *([LISTS_FILE] if "lists" in manifest else [])]
    if sorted(needed) != sorted(manifest["files"]):
        raise UserError(f"{folder / MANIFEST_FILE}: lists other files than an index has; build the index again")
    for name, expected in manifest["files"].items():
        try:
            found = content_sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror}); build the index again") from None
        if found != expected:
            raise UserError(f"{folder / name}: does not match its hash; build the index again")


def _identity(folder: Path) -> _Identity | None:
    try:
        found = (folder / MANIFEST_FILE).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
