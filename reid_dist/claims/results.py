"""Scores, costs and verdicts of all claims as one plain structure, the content of claims.json."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from reid_dist.benchmarks.machine import describe_machine
from reid_dist.claims.accounting import ACCOUNTINGS, Cost, equal_in, stage_cost
from reid_dist.claims.arms import Arm, Claim, Row
from reid_dist.claims.matrix import ARMS, SHARED
from reid_dist.claims.running import COST_FILE, STAGE, Settings, arm_config, arm_scores, arm_stage, check_recipe
from reid_dist.claims.verdict import Difference, Verdict, combine, judge
from reid_dist.claims.worlds import parameters, read_limits

METRICS = ("mAP", "R1")
DECIDING = "mAP"  # it scatters less than R1 on some thousand queries (tiny_models.md 3)


def collect(
    settings: Settings, claims: Sequence[Claim], arms: Sequence[Arm], seeds: Sequence[int], fast: bool = False
) -> dict[str, Any]:
    """Reads what finished arms left behind and judges the claims.

    Args:
        settings: of the runs.
        claims: to judge; rows of arms that are not among `arms` are left out.
        arms: those that were run.
        seeds: for which.
        fast: whether this is the short version.
    """
    config = check_recipe(settings)
    costs = arm_costs(settings, arms)
    scores = {arm.name: {seed: arm_scores(settings, arm, seed) for seed in seeds} for arm in arms}
    world = parameters(settings.level, settings.sizes, seeds[0])
    return {
        "machine": describe_machine(),
        "fast": fast,
        "seeds": list(seeds),
        "recipe": str(settings.recipe),
        "overrides": list(settings.overrides),
        "steps": arm_stage(config).steps,
        "batch": arm_stage(config).data.global_batch_size,
        "world": {key: value for key, value in world.items() if key != "seed"},
        "limits": _limits(settings, seeds),
        "arms": {arm.name: _arm_entry(settings, arm, costs[arm.name], scores[arm.name], seeds) for arm in arms},
        "claims": [claim_entry(claim, scores, costs) for claim in claims],
    }


def arm_costs(settings: Settings, arms: Sequence[Arm]) -> dict[str, Cost]:
    """What each arm costs with all arms that it starts from, but for the common beginning."""
    own = {}
    for arm in arms:
        config = arm_config(settings, arm, 0)
        own[arm.name] = stage_cost(config, arm_stage(config))
    return {arm.name: sum((own[name] for name in _ancestry(arm.name)), Cost()) for arm in arms}


def _ancestry(name: str) -> set[str]:
    """An arm with all that it starts from, but for the common beginning."""
    if name in SHARED:
        return set()
    return {name}.union(*(_ancestry(needed) for needed in ARMS[name].needs))


def claim_entry(claim: Claim, scores: dict[str, Any], costs: dict[str, Cost]) -> dict[str, Any]:
    """The verdicts on a claim: for each setting and accounting, and of the deciding one.

    Args:
        claim: the claim.
        scores: by arm, seed, task and metric.
        costs: by arm.
    """
    settings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in claim.rows:
        if row.better in scores and row.worse in scores:
            settings[row.setting].append(_row_entry(row, scores, costs))
    verdicts = {setting: _verdicts(rows, claim) for setting, rows in settings.items()}
    # The first setting decides, at equal image passes (methods.md 1.6) where it has such rows.
    first = claim.rows[0].setting
    decisive = next((each for each in ACCOUNTINGS if verdicts.get(first, {}).get(each) is not None), None)
    return {
        "name": claim.name, "text": claim.text, "source": claim.source, "rule": claim.rule, "differs": claim.differs,
        "verdict": None if decisive is None else verdicts[first][decisive],
        "decided_by": None if decisive is None else {"setting": first, "accounting": decisive},
        "settings": {setting: {"verdicts": verdicts[setting], "rows": rows} for setting, rows in settings.items()},
    }  # fmt: skip


def _row_entry(row: Row, scores: dict[str, Any], costs: dict[str, Cost]) -> dict[str, Any]:
    other = row.worse_task or row.task
    entry: dict[str, Any] = {"better": row.better, "worse": row.worse, "task": row.task, "worse_task": other}
    entry["decides"] = row.decides
    entry["equal_in"] = equal_in(costs[row.better], costs[row.worse], row.task)
    for metric in METRICS:
        pairs = [(scores[row.better][s][row.task][metric], scores[row.worse][s][other][metric]) for s in
                 scores[row.better]]  # fmt: skip
        entry[metric] = _difference_entry(judge([better - worse for better, worse in pairs]))
    return entry


def _difference_entry(difference: Difference) -> dict[str, Any]:
    return asdict(difference)


def _verdicts(rows: Sequence[dict[str, Any]], claim: Claim) -> dict[str, Verdict | None]:
    """By accounting; None where no deciding row is equal in it."""
    return {
        accounting: combine(
            [row[DECIDING]["verdict"] for row in rows if row["decides"] and accounting in row["equal_in"]], claim.rule
        )
        for accounting in ACCOUNTINGS
    }


def _arm_entry(
    settings: Settings, arm: Arm, cost: Cost, scores: dict[int, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    stage = arm_stage(arm_config(settings, arm, 0))
    entry: dict[str, Any] = {"about": arm.about, "starts_from": arm.needs, "steps": stage.steps, "kind": stage.kind}
    entry["batch"], entry["passes"] = stage.data.global_batch_size, asdict(cost)
    entry["scores"] = {
        task: {metric: [scores[seed][task][metric] for seed in seeds] for metric in METRICS}
        for task in scores[seeds[0]]
    }
    entry["cpu_seconds"] = [_seconds(settings, arm, seed) for seed in seeds]
    cosines = [_cosines(settings, arm, seed) for seed in seeds]
    if all(cosines):
        entry["gradient_cosine"] = {block: [each[block] for each in cosines] for block in cosines[0]}
    return entry


def _seconds(settings: Settings, arm: Arm, seed: int) -> float | None:
    try:
        found = json.loads((settings.run_folder(arm.name, seed) / COST_FILE).read_text())
    except OSError:  # stopped between its weights and this file
        return None
    return float(found["cpu_seconds"])


def _cosines(settings: Settings, arm: Arm, seed: int) -> dict[str, float]:
    """Mean over a joint stage of the cosine between both tasks' gradients, by block of the image tower."""
    history = json.loads((settings.run_folder(arm.name, seed) / STAGE / "training.json").read_text())
    points: dict[str, list[float]] = defaultdict(list)
    for point in history:
        for key, value in point.items():
            if key.startswith("conflict/"):
                points[key.removeprefix("conflict/")].append(value)
    return {block: statistics.fmean(values) for block, values in points.items()}


def _limits(settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """What chance, closed-form learners and a perfect reader reach: by name, task and metric, one value a seed."""
    found = [read_limits(settings.world(seed)) for seed in seeds]
    return {
        name: {
            task: {metric: [each[name][task][metric] for each in found] for metric in METRICS}
            for task in ("t2i", "i2i")
            if found[0][name].get(task)
        }
        for name in found[0]
    }
