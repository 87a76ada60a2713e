"""The quickstart's result table: `python -m reid_dist.benchmarks.quickstart RUN --oracle JSON [--seconds name=N ...]`.

Puts the recipe's scores beside chance, the untrained network, two closed-form learners fitted on the training
identities and the world's own oracle; writes results.json and a contact sheet of ranked results into RUN.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from reid_dist.checkpoint.portable import read_export
from reid_dist.config import RunConfig
from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.evaluation.baselines import closed_form_baselines
from reid_dist.evaluation.benchmark import extract_benchmark, i2i_task, load_baseline_data, t2i_task
from reid_dist.files import write_results
from reid_dist.inputs import build_encoder, open_inputs
from reid_dist.models.weights import load_weights
from reid_dist.recipe_file import load_config
from reid_dist.report.ranked import ranked_rows
from reid_dist.report.sheet import contact_sheet
from reid_dist.report.table import result_table
from reid_dist.revision import commit
from reid_dist.scoring import START, read_scores

RESULTS_FILE = "results.json"
SHEET_FILE = "contact_sheet.png"
# Trainings that `--compare` adds, as folders of the run: which stages differ, and how the table calls them.
COMPARATORS = {
    "without-pretrain": (slice(1, None), "without the generic stage"),
    "without-queue": (slice(-1, None), "without a queue"),
}
BASELINES = ("chance", "untrained", "histogram", "ridge", "oracle")
LABELS = {
    "chance": "chance (exact)",
    "untrained": "untrained network",
    "histogram": "histogram, whitened (closed form)",
    "ridge": "ridge histogram to words (closed form)",
    "oracle": "oracle: perfect reader of attributes",
    "raw_histogram": "histogram, raw",
}

Pair = dict[str, Any]


def report(run: Path, oracle: Path, seconds: dict[str, int]) -> str:
    """Writes results.json and the contact sheet; returns the table.

    Args:
        run: output folder of a finished recipe.
        oracle: written by `python -m shards.world oracle`.
        seconds: of the steps before this one, by name.

    Raises:
        UserError: the run is not finished, or a file is missing.
    """
    began = time.perf_counter()
    config = load_config(run / "config.yaml")
    baselines = _baselines(config, run, oracle)
    stages = [
        {
            "name": stage.name,
            **_waited(run / stage.name, stage.data.global_batch_size),
            **_pair(read_scores(run, stage.name)),
        }
        for stage in config.stages
    ]
    rows = [(LABELS.get(name, name), baselines[name]) for name in baselines]
    rows += [(f"after {stage['name']}", stage) for stage in stages]
    results: dict[str, Any] = {"commit": commit(), "baselines": baselines, "stages": stages}
    for name, (differing, label) in COMPARATORS.items():
        names = [stage.name for stage in config.stages[differing]]
        if all((run / name / each / "metrics.json").is_file() for each in names):
            compared = [{"name": each, **_pair(read_scores(run / name, each))} for each in names]
            results[name.replace("-", "_")] = compared
            rows += [(f"after {stage['name']}, {label}", stage) for stage in compared]
    _contact_sheet(config, run)
    # A run that was interrupted and continued took what its stages took, not what was left of them.
    staged = sum(read_scores(run, name)["seconds"] for name in (START, *(stage.name for stage in config.stages)))
    trained = max(seconds.get("train", 0), round(staged))
    taken = {**seconds, "train": trained, "report": round(time.perf_counter() - began)}
    results["seconds"] = {**taken, "total": sum(taken.values())}
    results["seed"] = config.seed
    results["fingerprint"] = (read_export(run / config.stages[-1].name / "export") or {}).get("fingerprint")
    write_results(run / RESULTS_FILE, results | _of_the_first_time(run, results["fingerprint"]))
    return f"{result_table(rows)}\n\n{_waits(stages)}"


def _waits(stages: list[Pair]) -> str:
    """A line on the waiting of all stages."""
    trained = [stage for stage in stages if "data_wait_percent" in stage]
    seconds = sum(stage["training_seconds"] for stage in trained)
    if not seconds:
        return "Nothing was trained."
    share = sum(stage["training_seconds"] * stage["data_wait_percent"] for stage in trained) / seconds
    each = ", ".join(f"{stage['name']} {stage['data_wait_percent']:.1f} %" for stage in trained)
    return f"Training waited for data {share:.1f} % of its time ({each})."


def _waited(folder: Path, batch: int) -> dict[str, float]:
    """How long a stage trained and which share of that its ranks waited for data; nothing for a stage of 0 steps."""
    try:
        history = json.loads((folder / "training.json").read_text())
    except OSError:
        return {}
    steps = [point["step"] - before for point, before in zip(history, [0, *(p["step"] for p in history)], strict=False)]
    times = [batch * count / point["samples_per_s"] for count, point in zip(steps, history, strict=True)]
    waited = sum(time * point["data_wait_percent"] for time, point in zip(times, history, strict=True))
    return {"training_seconds": round(sum(times), 1), "data_wait_percent": round(waited / sum(times), 2)}


def _of_the_first_time(run: Path, fingerprint: str | None) -> dict[str, Any]:
    """Commit and times of the report on this very model that is there already: a second run only skips."""
    try:
        earlier = json.loads((run / RESULTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    if fingerprint is None or earlier.get("fingerprint") != fingerprint:
        return {}
    return {key: earlier[key] for key in ("commit", "seconds")}


def _baselines(config: RunConfig, run: Path, oracle: Path) -> dict[str, Pair]:
    stage = config.stages[-1]
    sets = [ShardSet(stage.data.location(name)) for name in (*stage.evaluation.i2i, *stage.evaluation.t2i)]
    if len(sets) != 2:
        raise UserError(f"{run}: the quickstart scores one i2i and one t2i set, not {len(sets)}")
    closed = closed_form_baselines(
        load_baseline_data(sets[0], sets[1], config.model.image_size, stage.evaluation.split)
    )
    try:
        ceiling = json.loads(oracle.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{oracle}: cannot be read; write it with `python -m shards.world oracle`") from error
    rows = {
        **closed,
        "untrained": _pair(read_scores(run, START)),
        "oracle": {task: ceiling[task] for task in ("t2i", "i2i")},
    }
    first = {name: rows[name] for name in BASELINES}
    return first | {name: pair for name, pair in rows.items() if name not in first}


def _pair(scores: dict[str, Any]) -> Pair:
    """The scores of the only set of each task."""
    return {task: next(iter(scores[task].values()), None) for task in ("t2i", "i2i")}


def _contact_sheet(config: RunConfig, run: Path) -> None:
    """Ranked results of the last stage's model: sentences first, then images."""
    stage, size = config.stages[-1], config.model.image_size
    inputs = open_inputs(config, 1)
    encoder = build_encoder(config.model, config.seed)
    load_weights(encoder, str(run / stage.name / "export"), config.model.architecture, size)
    rows = []
    t2i, i2i = (encoder.for_task("t2i"), t2i_task), (encoder.for_task("i2i"), i2i_task)
    for (of_task, task), names in ((t2i, stage.evaluation.t2i), (i2i, stage.evaluation.i2i)):
        for name in names:
            shards = inputs.shards[stage.data.location(name)]
            tokenizer = inputs.tokenizer if task is t2i_task else None
            features = extract_benchmark(of_task, shards, tokenizer, size, split=stage.evaluation.split)
            rows += ranked_rows(shards, features, task(features))
    contact_sheet(run / SHEET_FILE, f"{run.name}: after stage {stage.name}, identities never seen in training", rows)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--oracle", type=Path, required=True)
    parser.add_argument("--seconds", nargs="*", default=[], metavar="name=N", help="time of the steps before this one")
    arguments = parser.parse_args(argv)
    try:
        seconds = {name: int(value) for name, _, value in (item.partition("=") for item in arguments.seconds)}
        print(report(arguments.run, arguments.oracle, seconds))
    except (UserError, ValueError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    print(
        f"\nwritten: {arguments.run / RESULTS_FILE}, {arguments.run / SHEET_FILE};"
        f" curves: tensorboard --logdir {arguments.run}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
