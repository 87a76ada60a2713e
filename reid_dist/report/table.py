"""Scores of models side by side, as an aligned Markdown table."""

from collections.abc import Iterable, Mapping, Sequence

from reid_dist.evaluation.ranking import METRIC_KEYS, Metrics


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
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width[i]) for i, cell in enumerate(cells) if i > 0]
        return "| " + " | ".join([cells[0].ljust(width[0]), *numbers]) + " |"

    rule = "|" + "|".join(["-" * (width[0] + 2), *("-" * (w + 1) + ":" for w in width[1:])]) + "|"
    note = "Percent. Cosine in fp32, rectangular AP, pessimistic ties; I2I drops same identity and camera. "
    note += "; ".join(_counts(task.upper(), [pair[task] for _, pair in rows]) for task in ("t2i", "i2i")) + "."
    return "\n".join([line(head), rule, *(line(cells) for cells in body), "", note])
