"""Candidates by faiss: every vector below a size, inverted lists of product codes above it.

Above `FLAT_LIMIT` photographs the vectors are sorted into lists around trained centres, and each is kept as a product
code of its difference to the centre (Jégou et al., "Product quantization for nearest neighbor search", 2011), in the
layout of 4-bit codes that registers look up (André et al., "Cache locality is not enough", 2015). A query reads the
nearest lists; the best candidates by code are then compared exactly, from the stored vectors (index.py).

Shape suffixes: N photographs, T training vectors, D features, C candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reid_dist.errors import UserError

LISTS_FILE = "lists.faiss"
FLAT_LIMIT = 50_000
Rows = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
_SEED = 1234
_BLOCK = 1 << 16
_TRAINING = 64  # vectors for each centre


def faiss_module() -> Any:
    """The optional library (extra `search`).

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("search: needs faiss; install the extra: pip install -e '.[search]'") from None
    return faiss


class Lists:
    """What finds candidates for a query."""

    def __init__(self, index: Any, settings: dict[str, Any] | None = None) -> None:
        """Takes a faiss index and, of inverted lists, what the manifest says of them."""
        self._index, self._settings = index, settings

    def candidates(self, query_D: npt.NDArray[np.float32], k: int, rows: Rows | None) -> Rows:
        """Rows that are likely among the best k; more than k where they are only likely.

        Args:
            query_D: of length 1.
            k: how many are wanted in the end.
            rows: those that count; None: all.

        Returns:
            At least k, or all that count where they are fewer.
        """
        faiss = faiss_module()
        passing = self._index.ntotal if rows is None else len(rows)
        selector = None if rows is None else faiss.IDSelectorBatch(rows)
        if self._settings is None:
            return self._search(query_D, k, faiss.SearchParameters(sel=selector))
        # A filter thins the lists: as many more of them are read, so that as many photographs are seen.
        probes = round(self._settings["probes"] * self._index.ntotal / max(passing, 1))
        while True:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(self._settings["centres"], probes))
            found = self._search(query_D, max(self._settings["candidates"], 4 * k), parameters)
            if len(found) >= min(k, passing) or probes >= self._settings["centres"]:
                return found
            probes *= 2

    def _search(self, query_D: npt.NDArray[np.float32], wanted: int, parameters: Any) -> Rows:
        _, found = self._index.search(query_D[None], min(wanted, self._index.ntotal), params=parameters)
        return np.asarray(found[0][found[0] >= 0], dtype=np.int64)


def flat_lists(vectors_ND: Half) -> Lists:
    """Compares every vector."""
    index = faiss_module().IndexFlatIP(vectors_ND.shape[1])
    index.add(np.asarray(vectors_ND, dtype=np.float32))
    return Lists(index)


def read_lists(path: Path, settings: dict[str, Any]) -> Lists:
    """Reads inverted lists, whose hash has been compared."""
    return Lists(faiss_module().read_index(str(path)), settings)


def build_lists(vectors_ND: Half, path: Path) -> dict[str, Any]:
    """Trains lists on the vectors, fills and writes them, the same bytes for the same vectors; may raise OSError.

    Args:
        vectors_ND: all of them.
        path: of the file.

    Returns:
        What the manifest says of them; nothing, and no file, where every vector is compared.
    """
    photographs, features = vectors_ND.shape
    faiss = faiss_module()
    if photographs <= FLAT_LIMIT:
        return {}
    centres = 1 << round(np.log2(4 * np.sqrt(photographs)))
    codes = _code_parts(features)
    index = faiss.index_factory(features, f"IVF{centres},PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 10, _TRAINING
    index.train(_sample(vectors_ND, _TRAINING * centres))
    _fill(index, vectors_ND, 0)
    _write(index, path)
    return {
        "kind": f"IVF{centres},PQ{codes}x4fs",
        "centres": centres,
        "probes": max(8, centres // 4),
        "candidates": 1000,
        "trained_on": photographs,
    }


def may_extend(settings: dict[str, Any] | None, photographs: int) -> bool:
    """Whether lists that were trained for fewer photographs still suit so many."""
    return settings is not None and photographs <= 2 * int(settings["trained_on"])


def extend_lists(vectors_ND: Half, settings: dict[str, Any], former: Path, path: Path) -> dict[str, Any]:
    """Adds the vectors that former lists, whose hash has been compared, do not hold yet; may raise OSError."""
    index = faiss_module().read_index(str(former))
    _fill(index, vectors_ND, index.ntotal)
    _write(index, path)
    return settings


def _code_parts(features: int) -> int:
    """Parts of a vector that get 4 bits each: pairs of features where they divide it."""
    return features // 2 if features % 2 == 0 else features


def _sample(vectors_ND: Half, most: int) -> npt.NDArray[np.float32]:
    """Vectors to train on, the same ones for the same number. Shape: (T, D)."""
    photographs = len(vectors_ND)
    if photographs <= most:
        return np.asarray(vectors_ND, dtype=np.float32)
    rows = np.random.default_rng(_SEED).choice(photographs, most, replace=False)
    return np.asarray(vectors_ND[np.sort(rows)], dtype=np.float32)


def _fill(index: Any, vectors_ND: Half, begin: int) -> None:
    for start in range(begin, len(vectors_ND), _BLOCK):
        index.add(np.asarray(vectors_ND[start : start + _BLOCK], dtype=np.float32))


def _write(index: Any, path: Path) -> None:
    faiss = faiss_module()
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # faiss tells a full disk this way
        raise OSError(f"{path}: cannot be written: {str(error).strip().splitlines()[-1]}") from None
