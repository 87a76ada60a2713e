"""Everything that an evaluation found, for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reid_dist import distributed
from reid_dist.evaluate.benchmarks import Benchmark
from reid_dist.evaluate.candidates import Candidate
from reid_dist.evaluate.records import PROTOCOL, Row
from reid_dist.evaluate.selection import Selection
from reid_dist.evaluate.tables import SeedMean
from reid_dist.evaluation.ranking import METRIC_KEYS
from reid_dist.evaluation.reranking.choice import describe_reranking
from reid_dist.report.table import PROTOCOL_NOTE
from reid_dist.revision import commit

FORMAT_VERSION = 1


def as_json(
    candidates: Sequence[Candidate],
    benchmarks: Sequence[Benchmark],
    rows: Sequence[Row],
    means: Sequence[SeedMean],
    selection: Selection | None,
    notes: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """The results as one JSON value.

    Args:
        candidates: every model that was given, also those that `selection` did not choose.
        benchmarks: what was asked.
        rows: the scores.
        means: over seeds.
        selection: of one of the models, or None.
        notes: what a reader should know.
        seconds: of the whole evaluation.
    """
    return {
        "format_version": FORMAT_VERSION,
        "protocol": {"version": PROTOCOL, "rules": PROTOCOL_NOTE},
        "models": [_model(candidate) for candidate in candidates],
        "benchmarks": [_benchmark(benchmark) for benchmark in benchmarks],
        "selection": None if selection is None else _selection(selection),
        "results": [_result(row) for row in rows],
        "seeds": [
            {"models": each.models, "seeds": each.seeds, **_asked(each.row), "mean": each.mean, "std": each.std}
            for each in means
        ],
        "notes": list(notes),
        "commit": commit(),
        "ranks": distributed.world_size(),
        "seconds": round(seconds, 1),
    }


def _model(candidate: Candidate) -> dict[str, Any]:
    manifest = candidate.manifest
    return {
        "name": candidate.name,
        "export": str(candidate.export.resolve()),
        "sha256": manifest["sha256"],
        "digest": candidate.digest,
        "stage": manifest.get("stage"),
        "steps": manifest.get("steps"),
        "fingerprint": manifest.get("fingerprint"),
        "seed": candidate.seed,
        "trained_on": candidate.training.names,
        "not_compared": candidate.training.unknown,
    }


def _benchmark(benchmark: Benchmark) -> dict[str, Any]:
    shards = benchmark.shards
    return {
        "name": benchmark.name,
        "dataset": shards.name,
        "location": shards.shown,
        "index_sha256": shards.manifest.index_sha256,
        "split": benchmark.split,
        "tasks": list(benchmark.tasks),
    }


def _selection(selection: Selection) -> dict[str, Any]:
    return {
        "split": "val",
        "metric": selection.criterion.label,
        "benchmarks": selection.benchmarks,
        "values": selection.values,
        "chosen": selection.chosen,
    }


def _asked(row: Row) -> dict[str, Any]:
    reranking = describe_reranking(row.reranking)
    return {"benchmark": row.benchmark, "split": row.split, "task": row.task, "reranking": reranking}


def _result(row: Row) -> dict[str, Any]:
    return {
        "model": row.model,
        **_asked(row),
        "metrics": {key: row.metrics[key] for key in METRIC_KEYS},
        "tied": row.metrics["tied"],
        "queries": int(row.metrics["queries"]),
        "skipped": int(row.metrics["skipped"]),
        "gallery": row.gallery,
        "seconds": row.seconds,
        "scored": row.scored,
        "was_recorded": row.is_read,
    }
