"""What every table of scores says of its rules, and the one of models side by side."""

from collections.abc import Iterable, Mapping, Sequence

from reid_dist.evaluation.ranking import METRIC_KEYS, Metrics
from reid_dist.report.document import Table, as_text

PROTOCOL_NOTE = (
    "In percent. Cosine in fp32, all positives of an identity, rectangular AP, ties pessimistic. i2i drops gallery "
    "images of the query's identity and camera; t2i and i2t know no cameras. Queries without a positive are skipped."
)


def _cells(metrics: Metrics | None) -> list[str]:
    return ["n/a" if metrics is None else f"{metrics[key]:.1f}" for key in METRIC_KEYS]


def _counts(task: str, metrics: Iterable[Metrics | None]) -> str:
    present = [one for one in metrics if one is not None]
    if not present:
        return f"{task}: not measured"
    # Chance and learners share one test set, so the counts agree; of the ties the worst is told.
    queries, skipped = int(present[0]["queries"]), int(present[0]["skipped"])
    return (
        f"{task}: {queries} queries, {skipped} skipped, at most {max(m.get('tied', 0.0) for m in present):.1f} % tied"
    )


def result_table(rows: Sequence[tuple[str, Mapping[str, Metrics | None]]]) -> str:
    """An aligned Markdown table of models by metrics in percent, with a line that states the protocol.

    Args:
        rows: (name, {"t2i": metrics or None, "i2i": metrics or None}), in the order to print.
    """
    head = ["", *(f"{task} {key}" for task in ("T2I", "I2I") for key in METRIC_KEYS)]
    body = [[name, *_cells(pair["t2i"]), *_cells(pair["i2i"])] for name, pair in rows]
    counts = "; ".join(_counts(task.upper(), [pair[task] for _, pair in rows]) for task in ("t2i", "i2i"))
    return as_text(Table(head, body, note=f"{PROTOCOL_NOTE} {counts}."))
