"""Scores that are kept beside the model: what was scored once is read, not scored again."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from reid_dist.data.transforms import decoder_name
from reid_dist.evaluate.benchmarks import Benchmark
from reid_dist.evaluate.candidates import Candidate
from reid_dist.evaluation.benchmark import TaskKind
from reid_dist.evaluation.ranking import METRIC_KEYS, Metrics
from reid_dist.evaluation.reranking.choice import Reranking, describe_reranking
from reid_dist.files import write_json

FOLDER = "evaluation"  # beside the export
# Of the rules that scores follow: another number when they change, and no score of the old rules is read any more.
PROTOCOL = 1


@dataclass(frozen=True)
class Row:
    """One score: a model, asked one task of one benchmark, ranked in one way.

    Attributes:
        model: name of the candidate.
        benchmark: its name.
        split: test or val.
        task: t2i, i2t or i2i.
        reranking: None: plain cosine.
        metrics: see `summarise`.
        gallery: entries.
        seconds: of ranking; encoding not counted.
        scored: when, UTC.
        is_read: it was recorded before.
    """

    model: str
    benchmark: str
    split: str
    task: TaskKind
    reranking: Reranking | None
    metrics: Metrics
    gallery: int
    seconds: float
    scored: str
    is_read: bool = False

    @property
    def ranked_by(self) -> str:
        """As tables print it."""
        return "cosine" if self.reranking is None else self.reranking.label


class Records:
    """The scores of one model on one benchmark that are on the disk.

    Attributes:
        model: its name.
        folder: where they are.
        problem: why they cannot be kept; empty when they can.
    """

    def __init__(self, candidate: Candidate, benchmark: Benchmark) -> None:
        export = candidate.export
        self.folder = (export.parent if export.name == "export" else export) / FOLDER
        self.model, self.problem = candidate.name, ""
        self._benchmark = benchmark
        self._decides = _what_decides(candidate, benchmark)

    def read(self, task: TaskKind, reranking: Reranking | None) -> Row | None:
        """A score of this very model, data and rules; None when there is none, or a damaged one."""
        path, decides = self._place(task, reranking)
        try:
            record = json.loads(path.read_text())
            if record["decides"] != decides:
                return None
            metrics = {key: float(record["metrics"][key]) for key in (*METRIC_KEYS, "queries", "skipped", "tied")}
            known = (int(record["gallery"]), float(record["seconds"]), str(record["scored"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all(map(math.isfinite, (*metrics.values(), known[1]))):
            return None
        return self.row(task, reranking, metrics, *known, is_read=True)

    def write(self, row: Row) -> None:
        """Keeps a score; a folder that one may not write to is no fault, only a `problem`."""
        path, decides = self._place(row.task, row.reranking)
        kept = {key: value for key, value in asdict(row).items() if key not in ("is_read", "reranking")}
        record = {**kept, "reranking": describe_reranking(row.reranking), "decides": decides}
        try:
            write_json(path, record)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self.problem = f"{self.folder}: scores cannot be recorded there ({error.strerror})"

    def row(
        self,
        task: TaskKind,
        reranking: Reranking | None,
        metrics: Metrics,
        gallery: int,
        seconds: float,
        scored: str | None = None,
        is_read: bool = False,
    ) -> Row:
        """A score of this model and benchmark; `scored` is now when nothing else is said."""
        scored = scored or datetime.now(timezone.utc).isoformat(timespec="seconds")
        names = self.model, self._benchmark.name, self._benchmark.split
        return Row(*names, task, reranking, metrics, gallery, seconds, scored, is_read)

    def _place(self, task: TaskKind, reranking: Reranking | None) -> tuple[Path, dict[str, Any]]:
        decides = {**self._decides, "task": task, "reranking": describe_reranking(reranking)}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        name = "cosine" if reranking is None else reranking.name
        dataset = self._benchmark.shards.name
        return self.folder / f"{dataset}.{self._benchmark.split}.{task}.{name}.{digest}.json", decides


def _what_decides(candidate: Candidate, benchmark: Benchmark) -> dict[str, Any]:
    shards = benchmark.shards
    data = hashlib.sha256(shards.manifest.model_dump_json().encode() + shards.index.tobytes())
    return {
        "protocol": PROTOCOL,
        "model": candidate.digest,
        "data": data.hexdigest(),
        "split": benchmark.split,
        "decoder": decoder_name(),
    }
