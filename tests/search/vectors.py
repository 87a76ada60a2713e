"""An index of random vectors without any photographs, and the search that compares everything."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from reid_dist.search.entries import Entry, Filter
from reid_dist.search.index import PhotoIndex
from reid_dist.search.store import changing, write_index


def clustered(count: int, features: int, people: int, seed: int = 0) -> npt.NDArray[np.float16]:
    """fp16 vectors of length 1 around random directions, one for each person."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((people, features))
    vector_ND = centre[rng.integers(people, size=count)] + 0.4 * rng.standard_normal((count, features))
    unit = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return unit.astype(np.float16)


def described(count: int) -> list[Entry]:
    return [
        Entry(f"/photos/{i}.jpg", "1", f"person {i % 7}", f"camera {i % 3}", f"20{10 + i % 9}") for i in range(count)
    ]


def write(folder: Path, vector_ND: npt.NDArray[np.float16], entries: list[Entry] | None = None) -> PhotoIndex:
    listed = described(len(vector_ND)) if entries is None else entries
    model = {"path": "/runs/none", "digest": "d" * 64, "features": vector_ND.shape[1], "stage": "t2i"}
    half = len(listed) // 2
    parts = [(listed[:half], vector_ND[:half]), (listed[half:], vector_ND[half:])]
    with changing(folder, create=True):
        write_index(folder, parts, len(listed), {"model": model})
    return PhotoIndex.open(folder)


def exact(
    vector_ND: npt.NDArray[np.float16], query_D: npt.NDArray[np.float32], k: int, rows: list[int]
) -> tuple[list[int], list[float]]:
    """Rows of the best k and their scores, in float64."""
    unit = query_D.astype(np.float64) / np.linalg.norm(query_D.astype(np.float64))
    score = {row: float(vector_ND[row].astype(np.float64) @ unit) for row in rows}
    best = sorted(rows, key=lambda row: (-score[row], row))[:k]
    return best, [score[row] for row in best]


def passing(entries: list[Entry], where: Filter | None) -> list[int]:
    if where is None:
        return list(range(len(entries)))
    return [
        row
        for row, entry in enumerate(entries)
        if where.person in (None, entry.person) and where.camera in (None, entry.camera)
    ]
