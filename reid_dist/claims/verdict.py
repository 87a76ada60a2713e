"""When a difference between arms counts: paired over seeds, by a rule that was fixed before anything was run."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["supported", "contradicted", "within noise"]
LEAST_SEEDS = 4  # that must agree in sign, whatever the number of seeds
SHARE = 0.8  # of the seeds that must agree
ERRORS = 2.0  # standard errors that the mean must exceed


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        values: one for each seed.
        mean: of the values.
        error: standard error of the mean; None with a single seed.
        agreeing: seeds whose sign is that of the mean.
        verdict: on "the difference is positive".
    """

    values: tuple[float, ...]
    mean: float
    error: float | None
    agreeing: int
    verdict: Verdict


def judge(values: Sequence[float]) -> Difference:
    """Judges paired differences.

    "supported" (mean above 0) or "contradicted" (below) only when at least 4 seeds and 80 % of them agree in sign and
    the mean exceeds 2 standard errors; else "within noise".

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no differences to judge")
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    agreeing = sum(value * mean > 0 for value in values)
    enough = agreeing >= max(LEAST_SEEDS, math.ceil(SHARE * len(values)))
    clear = enough and error is not None and abs(mean) > ERRORS * error
    verdict: Verdict = "within noise" if not clear else "supported" if mean > 0 else "contradicted"
    return Difference(tuple(values), mean, error, agreeing, verdict)


def combine(verdicts: Sequence[Verdict], rule: Literal["all", "any"]) -> Verdict | None:
    """The verdict on a claim of several comparisons.

    Args:
        verdicts: of the comparisons; of none there is no verdict.
        rule: "all": supported where all are, contradicted by one; "any": supported by one, contradicted where all are.
    """
    if not verdicts:
        return None
    helps: Verdict = "supported" if rule == "any" else "contradicted"
    needs_all: Verdict = "contradicted" if rule == "any" else "supported"
    if helps in verdicts:
        return helps
    return needs_all if all(each == needs_all for each in verdicts) else "within noise"
