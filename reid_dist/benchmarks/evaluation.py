"""Ranking a large test set, beside the bare product and the toolkits' sort: `benchmark.py evaluation --json OUT`.

Random features of people at the size of MSMT17's test set, in one process on all cores; features count as held before,
what is measured is time and memory beyond them. The bare product multiplies all queries with the gallery in blocks of
512 and keeps nothing. The toolkits sort the whole gallery for each query; their algorithm is measured on the first 512
queries, all at once in numpy, and as their loop over the queries. Ours must give their ranks and mean AP. Of
several rounds the least time and the most memory count.

Shape suffixes: Q queries, G gallery entries, D feature, C queries of a block.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reid_dist.benchmarks.kernel import check_writable
from reid_dist.benchmarks.kernel_worker import peak_extra_bytes
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.errors import UserError
from reid_dist.evaluation.ranking import QueryRanks, Retrieval, rank_queries
from reid_dist.evaluation.reranking.k_reciprocal import k_reciprocal
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard
from reid_dist.files import write_results

BLOCK = 512
_CPU = torch.device("cpu")
# Rounding swaps entries that are less than an fp32 step apart, here and there in a gallery of that size.
_MEAN_AP_TOLERANCE, _FIRST_TOLERANCE = 1e-6, 0.01
Column = npt.NDArray[np.int64]


class Answer(NamedTuple):
    """What a sort found for each query that has positives: average precision, and the rank of the first."""

    ap: npt.NDArray[np.float64]
    first: Column


def make_retrieval(queries: int, gallery: int, identities: int, features: int, cameras: int = 15) -> Retrieval:
    """Images of people around centres of their own; every identity and camera as likely as the others."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(identities, features, generator=generator)

    def side(size: int) -> tuple[Tensor, Tensor, Tensor]:
        pid = torch.randint(identities, (size,), generator=generator)
        feature = centre[pid].add_(torch.randn(size, features, generator=generator), alpha=3)
        camera = torch.randint(cameras, (size,), generator=generator)
        return torch.nn.functional.normalize(feature, dim=1), pid, camera

    (query, query_pid, query_camera), (entry, entry_pid, entry_camera) = side(queries), side(gallery)
    return Retrieval(query, entry, query_pid, entry_pid, query_camera, entry_camera)


def bare_product(task: Retrieval) -> None:
    """The similarities of all queries, in blocks whose result is overwritten by the next."""
    similarity_CG = torch.empty(BLOCK, len(task.gallery_GD))
    for query_CD in torch.split(task.query_QD, BLOCK):
        torch.mm(query_CD, task.gallery_GD.T, out=similarity_CG[: len(query_CD)])


def sorted_at_once(task: Retrieval) -> Answer:
    """The toolkits' metrics with array operations."""
    query_pid, gallery_pid, query_camera, gallery_camera = _labels(task)
    order_CG = np.argsort(-(task.query_QD @ task.gallery_GD.T).numpy(), axis=1)
    same_CG = gallery_pid[order_CG] == query_pid[:, None]
    kept_CG = ~(same_CG & (gallery_camera[order_CG] == query_camera[:, None]))
    right_CG = same_CG & kept_CG
    precision_CG = right_CG.cumsum(axis=1) / np.maximum(kept_CG.cumsum(axis=1), 1)
    positives_C = right_CG.sum(axis=1)
    first_C = np.where(right_CG, kept_CG.cumsum(axis=1), kept_CG.shape[1] + 1).min(axis=1)
    ap_C = (precision_CG * right_CG).sum(axis=1) / np.maximum(positives_C, 1)
    valid_C = positives_C > 0
    return Answer(ap_C[valid_C], first_C[valid_C])


def sorted_in_a_loop(task: Retrieval) -> Answer:
    """The same, query by query, with their running precision as a list."""
    query_pid, gallery_pid, query_camera, gallery_camera = _labels(task)
    order_CG = np.argsort(-(task.query_QD @ task.gallery_GD.T).numpy(), axis=1)
    match_CG = (gallery_pid[order_CG] == query_pid[:, None]).astype(np.int32)
    found, first = [], []
    for pid, camera, order_G, match_G in zip(query_pid, query_camera, order_CG, match_CG, strict=True):
        removed_G = (gallery_pid[order_G] == pid) & (gallery_camera[order_G] == camera)
        right_G = match_G[~removed_G]
        if not right_G.any():
            continue
        cmc_G = right_G.cumsum()
        precision = [hits / (place + 1.0) for place, hits in enumerate(cmc_G)]
        cmc_G[cmc_G > 1] = 1
        found.append((np.asarray(precision) * right_G).sum() / right_G.sum())
        first.append(int(cmc_G.argmax()) + 1)
    return Answer(np.array(found), np.array(first))


def _labels(task: Retrieval) -> tuple[Column, Column, Column, Column]:
    assert task.query_camid_Q is not None and task.gallery_camid_G is not None
    columns = (task.query_pid_Q, task.gallery_pid_G, task.query_camid_Q, task.gallery_camid_G)
    return tuple(column.numpy() for column in columns)  # type: ignore[return-value]


def _row(name: str, task: Retrieval, call: Callable[[], object], rounds: int = 1) -> dict[str, Any]:
    """The least time and the most memory of a call."""
    seconds = []

    def timed() -> None:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)

    extra = [peak_extra_bytes(timed, _CPU) for _ in range(rounds)]
    return {
        "implementation": name,
        "queries": len(task.query_QD),
        "gallery": len(task.gallery_GD),
        "D": task.query_QD.shape[1],
        "seconds": min(seconds),
        "seconds_per_query": min(seconds) / len(task.query_QD),
        "extra_bytes": None if None in extra else max(filter(None, extra), default=0),
    }


def measure(task: Retrieval, rounds: int) -> list[dict[str, Any]]:
    """Ours and the bare product of all queries, and the toolkits' sorts of the first 512.

    Raises:
        RuntimeError: ours and theirs find different ranks or another mAP.
    """
    part = task.only(slice(BLOCK))
    answers: dict[str, Any] = {}

    def keep(name: str, call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: answers.update({name: call()})

    first = f"argsort, {len(part.query_QD)} queries"
    rows = [
        _row("ours", task, keep("ours", lambda: rank_queries(task)), rounds),
        _row("similarity product alone", task, lambda: bare_product(task), rounds),
        _row(f"{first} at once", part, keep("at once", lambda: sorted_at_once(part)), rounds),
        _row(f"{first} in a loop", part, keep("loop", lambda: sorted_in_a_loop(part)), rounds),
    ]
    _compare(answers["ours"], [answers["at once"], answers["loop"]], len(part.query_QD))
    return rows


def _compare(ours: QueryRanks, theirs: list[Answer], queries: int) -> None:
    valid_Q = ours.positives_Q[:queries] > 0
    ap, first = ours.ap_Q[:queries][valid_Q].numpy(), ours.first_Q[:queries][valid_Q].numpy()
    for answer in theirs:
        differ = np.mean(answer.first != first) if len(answer.first) == len(first) else 1.0
        if differ > _FIRST_TOLERANCE or abs(np.mean(answer.ap) - np.mean(ap)) > _MEAN_AP_TOLERANCE:
            raise RuntimeError("evaluation benchmark: ours and the toolkits' ranks or mAP differ")


def measure_reranked(task: Retrieval) -> list[dict[str, Any]]:
    """Both re-rankings of all queries, from features to ranks."""
    return [
        _row("ours, neighbour Jaccard (5, 0.05)", task, lambda: rank_queries(neighbour_jaccard(task))),
        _row("ours, k-reciprocal (20, 6, 0.3)", task, lambda: rank_queries(k_reciprocal(task))),
    ]


def measure_streamed(queries: int, gallery: int, features: int) -> dict[str, Any]:
    """A gallery in an fp16 file, of which a segment at a time is in memory."""
    task = make_retrieval(queries, queries * 8, queries, features)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="reid_dist-benchmark-") as folder:
        path = Path(folder) / "gallery.npy"
        stored = np.lib.format.open_memmap(path, "w+", np.float16, (gallery, features))
        stored[: len(task.gallery_GD)] = task.gallery_GD
        for start in range(len(task.gallery_GD), gallery, BLOCK * 16):  # distractors
            part = stored[start : start + BLOCK * 16]
            part[:] = generator.standard_normal(part.shape, np.float32)
        stored.flush()
        others = gallery - len(task.gallery_GD)
        assert task.gallery_camid_G is not None
        mapped = replace(
            task,
            gallery_GD=torch.from_numpy(np.load(path, mmap_mode="c")),
            gallery_pid_G=torch.nn.functional.pad(task.gallery_pid_G, (0, others), value=-1),
            gallery_camid_G=torch.nn.functional.pad(task.gallery_camid_G, (0, others), value=-1),
        )
        return _row("ours, gallery streamed from a file", mapped, lambda: rank_queries(mapped))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py evaluation`; sizes default to MSMT17's test set."""
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument("--queries", type=int, default=11_659, help="default: 11659")
    parser.add_argument("--gallery", type=int, default=82_161, help="default: 82161")
    parser.add_argument("--identities", type=int, default=3_060, help="default: 3060")
    parser.add_argument("--features", type=int, default=512, help="default: 512")
    parser.add_argument("--rounds", type=int, default=2, help="but of re-rankings and the file (default: 2)")
    parser.add_argument("--rerank", action="store_true", help="also both re-rankings, of all queries")
    parser.add_argument("--streamed", type=int, default=0, metavar="N", help="also a gallery of N entries in a file")
    parser.add_argument("--streamed-queries", type=int, default=2048, help="against that gallery (default: 2048)")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| implementation | queries | gallery | seconds | ms a query | extra memory MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:,.0f}"
        lines.append(
            f"| {row['implementation']} | {row['queries']:,} | {row['gallery']:,} | {row['seconds']:.1f} |"
            f" {1e3 * row['seconds_per_query']:.2f} | {memory} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        UserError: wrong options or a file that cannot be written.
    """
    for name in ("queries", "gallery", "identities", "features", "rounds", "streamed_queries"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.streamed and options.streamed < 8 * options.streamed_queries:
        raise UserError(f"--streamed {options.streamed}: must be 0, or at least 8 entries for each streamed query")
    check_writable("--json", options.json)
    machine = describe_machine()  # its load before ours
    task = make_retrieval(options.queries, options.gallery, options.identities, options.features)
    rows = measure(task, options.rounds)
    if options.rerank:
        rows += measure_reranked(task)
    del task
    if options.streamed:
        rows.append(measure_streamed(options.streamed_queries, options.streamed, options.features))
    write_results(options.json, {"rows": rows, "machine": machine, "threads": torch.get_num_threads()})
    print(f"{table(rows)}\nwritten: {options.json}")
