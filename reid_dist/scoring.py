"""Scores of a run's stages on its benchmarks: computed, recorded, read back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reid_dist import distributed
from reid_dist.config import RunConfig, StageConfig
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import evaluate_benchmark
from reid_dist.evaluation.ranking import METRIC_KEYS
from reid_dist.evaluation.reranking.choice import NeighbourJaccard
from reid_dist.files import write_json
from reid_dist.inputs import Inputs
from reid_dist.metrics import say, write_scalars
from reid_dist.models.dual_encoder import DualEncoder, Task

START = "start"  # the scores of the weights that the first stage gets
RERANKED = "t2i_reranked"
Scores = dict[str, dict[str, Any]]


def evaluate(
    encoder: DualEncoder, stage: StageConfig, inputs: Inputs, device: torch.device, size: tuple[int, int]
) -> Scores:
    """Metrics of every benchmark, with the features of its task: {"t2i": {set: metrics}, "i2i": {set: metrics}}.

    With `evaluation.rerank` also {"t2i_reranked": {set: metrics}}.
    """
    encoder.to(device)
    cache = inputs.cache if stage.data.cache else None
    wanted = stage.evaluation.rerank
    reranking = None if wanted is None else NeighbourJaccard(wanted.neighbours, wanted.weight)
    scores: Scores = {"t2i": {}, "i2i": {}}
    if reranking is not None:
        scores[RERANKED] = {}
    tasks: dict[Task, list[str]] = {"t2i": stage.evaluation.t2i, "i2i": stage.evaluation.i2i}
    for task, names in tasks.items():
        of_task = encoder.for_task(task)
        for name in names:
            shards = inputs.shards[stage.data.location(name)]
            tokenizer = inputs.tokenizer if task == "t2i" else None
            batch_size, split = stage.evaluation.batch_size, stage.evaluation.split
            pair = evaluate_benchmark(
                of_task, shards, tokenizer, size, batch_size, device, split, cache, reranking, wanted=[task]
            )
            if pair[task] is None:
                raise UserError(
                    f"evaluation.{task}: {shards.shown} has nothing for this task in split {stage.evaluation.split}"
                )
            scores[task][name] = pair[task]
            reranked = pair.get(RERANKED)
            if reranking is not None and reranked is not None:
                scores[RERANKED][name] = {**reranked, **asdict(reranking)}
    return scores


def record_scores(config: RunConfig, name: str, split: str, scores: Scores, seconds: float) -> None:
    """Says, plots and writes the scores of a stage (or of `START`). Every rank calls it."""
    for task, sets in scores.items():
        for shard_set, metrics in sets.items():
            how = f" ({metrics['neighbours']} neighbours, weight {metrics['weight']})" if task == RERANKED else ""
            say(
                f"{name}: {task}{how} on {shard_set}: R1 {metrics['R1']:.1f}, R5 {metrics['R5']:.1f},"
                f" R10 {metrics['R10']:.1f}, mAP {metrics['mAP']:.1f}, mINP {metrics['mINP']:.1f}"
            )
            step = 0 if name == START else 1 + [stage.name for stage in config.stages].index(name)
            write_scalars(
                config.output_dir / "tensorboard",
                step,
                {f"evaluation/{task}/{shard_set}/{key}": metrics[key] for key in METRIC_KEYS},
            )
    if distributed.rank() == 0:
        record = {"name": name, "split": split, "seconds": round(seconds, 1), **scores}
        write_json(config.output_dir / name / "metrics.json", record)
    distributed.barrier()


def is_scored(output_dir: Path, name: str, stage: StageConfig) -> bool:
    """Whether everything that a stage's configuration wants scored has been."""
    try:
        scores = read_scores(output_dir, name)
    except UserError:
        return False
    wanted = {"t2i": stage.evaluation.t2i, "i2i": stage.evaluation.i2i}
    if scores.get("split") != stage.evaluation.split or any(set(wanted[t]) - set(scores[t]) for t in wanted):
        return False
    parameters = {} if stage.evaluation.rerank is None else stage.evaluation.rerank.model_dump()
    reranked = scores.get(RERANKED, {})
    return not parameters or all(parameters.items() <= reranked.get(name, {}).items() for name in wanted["t2i"])


def read_scores(output_dir: Path, name: str) -> dict[str, Any]:
    """The metrics of a finished stage (or of `START`).

    Raises:
        UserError: the stage has not been evaluated.
    """
    path = output_dir / name / "metrics.json"
    try:
        scores: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read; run the recipe first") from error
    return scores
