"""Latency and recall of search in a large gallery of the procedural world: `benchmark.py search --run RUN --json OUT`.

The gallery: pictures of many worlds of `python -m shards.world`, ten thousand from each, encoded by a trained model and
kept as features in `--cache`, part by part; a killed run goes on with the part it was at. Of each part's pictures some
are held out as queries: as pictures, and by their sentences. No feature is used twice, changed or made up.

Rows: the index as `launch/search.py` makes it, and comparing everything, as one product of the query with all fp32
features. `latency_ms_p50` is the time of `PhotoIndex.search` for one query at a time, its features given, after the
files have been read once. `recall_at_10`: share of the ten hits whose exact score reaches that of the exact tenth.
`bytes_per_vector` counts the vectors' and lists' files, `bytes_per_photograph` the whole index.

Shape suffixes: N photographs, Q queries, D features.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.errors import UserError
from reid_dist.files import write_results
from reid_dist.search.encoding import encode_entries, read_chunk
from reid_dist.search.entries import Entry
from reid_dist.search.index import PhotoIndex
from reid_dist.search.lists import LISTS_FILE, faiss_module
from reid_dist.search.sources import list_source
from reid_dist.search.store import changing, write_index
from reid_dist.trained import TrainedModel, load

SHOTS = 21  # pictures of a person; the last one is a query
_PART = 500  # people of a part
_FIRST_SEED = 1000  # worlds that nothing was trained on
_WARM_UP = 20
_TOP = 10
_BLOCK = 1 << 16
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """Features of one world, fp32 of length 1.

    Attributes:
        gallery_ND: of pictures.
        image_QD: of pictures held out, one of each person.
        text_QD: of a sentence about each of them.
    """

    gallery_ND: Floats
    image_QD: Floats
    text_QD: Floats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py search`."""
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/search_benchmark"),
        help="trained model; the goal is stated for 512 features (default: %(default)s, see docs/search.md)",
    )
    parser.add_argument("--vectors", type=int, default=1_000_000, help="of the gallery (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=500, help="of each kind (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("data/search_benchmark"), help="default: %(default)s")
    parser.add_argument("--level", default="quickstart", help="of the worlds (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table and writes the file.

    Raises:
        UserError: wrong options, no model, or a file that cannot be written.
    """
    for name in ("vectors", "queries"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be above 0")
    check_writable("--json", options.json)
    faiss_module()
    machine = describe_machine()
    model = load(options.run, "cpu")
    parts = -(-options.vectors // (_PART * (SHOTS - 1)))
    folder = options.cache / f"{model.digest[:16]}.{options.level}"
    paths = [
        make_part(folder, model, number, options.level) for number in tqdm(range(parts), desc="worlds", disable=None)
    ]
    index, seconds = _index(folder / f"{options.vectors}.index", paths, options.vectors, model)
    rows = measure(index, paths, options.vectors, options.queries)
    settings = {"vectors": options.vectors, "queries": options.queries, "level": options.level, "worlds": parts}
    settings |= {"model": model.digest, "lists": index.manifest.get("lists"), "index_seconds": round(seconds, 1)}
    settings["threads"] = faiss_module().omp_get_max_threads()
    write_results(options.json, {"rows": rows, "settings": settings, "machine": machine})
    print(f"{table(rows)}\nwritten: {options.json}")


def make_part(folder: Path, model: TrainedModel, number: int, level: str) -> Path:
    """Features of a world, from the cache where they are there.

    Raises:
        UserError: the world cannot be drawn.
    """
    path = folder / f"part-{number:04d}.npz"
    if path.is_file():
        return path
    tree, work = folder / "world", folder / "world.work"
    shutil.rmtree(tree, ignore_errors=True)
    options = {"--ids": 1, "--test-ids": _PART, "--images": SHOTS, "--seed": _FIRST_SEED + number, "--level": level}
    options |= {"--workers": len(os.sched_getaffinity(0)), "--out": tree}
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "shards.world", "export", "cuhk_pedes", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"shards.world: {(done.stderr.strip().splitlines() or ['ended'])[-1]}")
    part = _encode(tree, work, model)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, gallery=part.gallery_ND, image=part.image_QD, text=part.text_QD)
    partial.rename(path)
    shutil.rmtree(tree)
    shutil.rmtree(work)
    return path


def _encode(tree: Path, work: Path, model: TrainedModel) -> Part:
    records = {record["file_path"]: record for record in json.loads((tree / "reid_raw.json").read_text())}
    entries = [entry for entry in list_source(str(tree / "imgs")).entries if "/test_query/" in entry.file]
    chunks = [read_chunk(path) for path in encode_entries([model], entries, work)]
    image_ND = np.concatenate([chunk.vectors_BD for chunk in chunks if chunk is not None]).astype(np.float32)
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    names = [str(Path(entry.file).relative_to(tree.absolute() / "imgs")) for entry in entries]
    held_N = np.array([name.endswith(f"_s{SHOTS}.jpg") for name in names])
    sentences = [records[name]["captions"][0] for name, held in zip(names, held_N, strict=True) if held]
    return Part(image_ND[~held_N], image_ND[held_N], model.encode_text(sentences).cpu().numpy())


def _parts(paths: list[Path], vectors: int) -> Iterator[Floats]:
    """The gallery's features, part by part, up to a number."""
    left = vectors
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            gallery_ND: Floats = file["gallery"][:left]
        left -= len(gallery_ND)
        yield gallery_ND


def _index(folder: Path, paths: list[Path], vectors: int, model: TrainedModel) -> tuple[PhotoIndex, float]:
    """The index of the gallery, written as `launch/search.py index` writes it, and the seconds that this took."""

    def described() -> Iterator[tuple[list[Entry], npt.NDArray[np.float16]]]:
        for number, gallery_ND in enumerate(_parts(paths, vectors)):
            files = [f"/photographs/{number:04d}/{row:05d}.jpg" for row in range(len(gallery_ND))]
            yield [Entry(file, "1", camera=str(number)) for file in files], gallery_ND.astype(np.float16)

    settings = {"path": str(model.folder.absolute()), "digest": model.digest, "features": model.features}
    began = time.perf_counter()
    with changing(folder, create=True):
        write_index(folder, described(), vectors, {"model": settings})
    return PhotoIndex.open(folder), time.perf_counter() - began


def _spread(paths: list[Path], key: str, queries: int) -> Floats:
    """Queries of one kind, about as many from each world. Shape: (Q, D)."""
    each = -(-queries // len(paths))
    parts = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            parts.append(file[key][:each])
    spread: Floats = np.concatenate(parts)[:queries]
    return spread


def measure(index: PhotoIndex, paths: list[Path], vectors: int, queries: int) -> list[dict[str, Any]]:
    """Two rows for each kind of query: the index, and comparing everything."""
    gallery_ND = np.empty((vectors, index.features), dtype=np.float32)
    begin = 0
    for part_ND in _parts(paths, vectors):
        gallery_ND[begin : begin + len(part_ND)] = part_ND
        begin += len(part_ND)
    rows: list[dict[str, Any]] = []
    for kind in ("image", "text"):
        query_QD = _spread(paths, kind, queries)
        tenth_Q = _tenth(gallery_ND, query_QD)
        lists = index.folder / LISTS_FILE
        size = index.vectors_ND.nbytes + (lists.stat().st_size if lists.is_file() else 0)
        total = sum(file.stat().st_size for file in index.folder.iterdir())

        def by_index(query_D: Floats) -> list[int]:
            return [hit.row for hit in index.search(query_D, _TOP)]

        def by_all(query_D: Floats) -> list[int]:
            score_N = gallery_ND @ query_D
            best = np.argpartition(score_N, -_TOP)[-_TOP:]
            return [int(row) for row in best[np.argsort(-score_N[best])]]

        for name, find, size_of in (
            ("index", by_index, (size, total)),
            ("flat fp32", by_all, (gallery_ND.nbytes,) * 2),
        ):
            rows.append(
                {
                    "method": name,
                    "query": kind,
                    "vectors": vectors,
                    "features": index.features,
                    **_measured(find, gallery_ND, query_QD, tenth_Q),
                    "bytes_per_vector": round(size_of[0] / vectors, 1),
                    "bytes_per_photograph": round(size_of[1] / vectors, 1),
                }
            )
    return rows


def _tenth(gallery_ND: Floats, query_QD: Floats) -> Floats:
    """Exact score of each query's tenth best, block by block. Shape: (Q,)."""
    best_QK = np.full((len(query_QD), 0), -2, dtype=np.float32)
    for begin in range(0, len(gallery_ND), _BLOCK):
        found = np.concatenate([best_QK, query_QD @ gallery_ND[begin : begin + _BLOCK].T], axis=1)
        top = min(_TOP, found.shape[1])
        best_QK = -np.partition(-found, top - 1, axis=1)[:, :top]
    tenth_Q: Floats = best_QK.min(axis=1)
    return tenth_Q


def _measured(
    find: Callable[[Floats], list[int]], gallery_ND: Floats, query_QD: Floats, tenth_Q: Floats
) -> dict[str, float]:
    for query_D in query_QD[-_WARM_UP:]:
        find(query_D)
    times, right = [], 0
    for query_D, tenth in zip(query_QD, tenth_Q, strict=True):
        began = time.perf_counter()
        found = find(query_D)
        times.append((time.perf_counter() - began) * 1e3)
        # One unit in the last place of fp32 sums: pictures that are equal may come in either order.
        right += int((gallery_ND[found] @ query_D >= tenth - 1e-6).sum())
    wanted = min(_TOP, len(gallery_ND)) * len(query_QD)
    p95 = float(np.quantile(times, 0.95))
    return {
        "latency_ms_p50": round(statistics.median(times), 3),
        "latency_ms_p95": round(p95, 3),
        "recall_at_10": round(right / wanted, 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"  {'method':<10}{'query':<7}{'vectors':>10}{'p50 ms':>9}{'p95 ms':>9}{'recall@10':>11}{'bytes/vector':>14}"
    ]
    for row in rows:
        lines.append(
            f"  {row['method']:<10}{row['query']:<7}{row['vectors']:>10,}{row['latency_ms_p50']:>9.2f}"
            f"{row['latency_ms_p95']:>9.2f}{row['recall_at_10']:>11.4f}{row['bytes_per_vector']:>14,.1f}"
        )
    return "\n".join(lines)
