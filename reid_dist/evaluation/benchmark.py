"""The retrieval tasks of a shard set: which rows are queries and gallery, scored on all ranks together.

All ranks enter a function that scores or none.

Shape suffixes: N images, M captions, D feature, Q queries, G gallery entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reid_dist.data.cache import ImageCache
from reid_dist.data.loader import eval_batches
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.sample import ROLES
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.errors import UserError
from reid_dist.evaluation.baselines import BaselineData, ImageSet
from reid_dist.evaluation.features import Encoder, Features, extract
from reid_dist.evaluation.ranking import (
    Metrics,
    QueryRanks,
    Retrieval,
    rank_queries,
    summarise,
)
from reid_dist.evaluation.reranking.choice import Reranking
from reid_dist.evaluation.sharing import over_ranks

Pair = dict[str, Metrics | None]
TaskKind = Literal["t2i", "i2t", "i2i"]


@dataclass(frozen=True)
class Task:
    """One retrieval task cut out of features, and where its entries came from.

    Attributes:
        kind: what is asked for what: captions for images, images for captions, images for images.
        retrieval: what `ranking` takes; with cameras for I2I alone.
        query_Q: position of each query among the images (I2T, I2I) or the captions (T2I) of the features.
        gallery_G: position of each gallery entry among the images (T2I, I2I) or the captions (I2T) of the features.
    """

    kind: TaskKind
    retrieval: Retrieval
    query_Q: Tensor
    gallery_G: Tensor


@dataclass(frozen=True)
class TaskResult:
    """A task that was scored.

    Attributes:
        kind: of the task.
        reranking: what its similarity was; None: plain cosine.
        task: with the similarity that was ranked, so that `top_matches(task.retrieval, k)` shows what was counted.
        ranks: of every query, in the order of the task's.
        metrics: see `summarise`.
    """

    kind: TaskKind
    reranking: Reranking | None
    task: Task
    ranks: QueryRanks
    metrics: Metrics


def benchmark_rows(shards: ShardSet, split: str = "test") -> Rows:
    """Every row of a split that takes part in retrieval: queries, gallery and distractors, not junk."""
    return shards.rows(split, ["query", "gallery", "distractor"])


def require_rows(shards: ShardSet, split: str) -> Rows:
    """`benchmark_rows`, of which there must be some.

    Raises:
        UserError: the split has neither queries nor a gallery.
    """
    rows = benchmark_rows(shards, split)
    if len(rows) == 0:
        raise UserError(
            f"evaluation: {shards.shown} ({shards.name}): no query or gallery images in split {split}; "
            "choose another split or benchmark"
        )
    return rows


def _has_role(role_N: Tensor, *names: str) -> Tensor:
    chosen = torch.tensor([ROLES.index(name) for name in names], device=role_N.device)
    return torch.isin(role_N, chosen)


def t2i_task(features: Features) -> Task | None:
    """Captions of query and gallery images against every distinct image; None without captions."""
    if features.text_MD is None:
        return None
    query_Q = (~_has_role(features.role_N, "distractor")[features.text_image_M]).nonzero().flatten()
    retrieval = Retrieval(
        features.text_MD[query_Q],
        features.image_ND,
        features.text_pid_M[query_Q],
        features.image_pid_N,
    )
    return Task(
        "t2i",
        retrieval,
        query_Q,
        torch.arange(len(features.row_N), device=query_Q.device),
    )


def i2t_task(features: Features) -> Task | None:
    """T2I with the sides swapped: every distinct image against the captions; None without captions."""
    task = t2i_task(features)
    if task is None:
        return None
    sides = task.retrieval
    swapped = Retrieval(sides.gallery_GD, sides.query_QD, sides.gallery_pid_G, sides.query_pid_Q)
    return Task("i2t", swapped, query_Q=task.gallery_G, gallery_G=task.query_Q)


def i2i_task(features: Features) -> Task | None:
    """Query images against gallery and distractors with their cameras; None unless the set has both sides."""
    query_Q = _has_role(features.role_N, "query").nonzero().flatten()
    gallery_G = _has_role(features.role_N, "gallery", "distractor").nonzero().flatten()
    if len(query_Q) == 0 or len(gallery_G) == 0:
        return None
    query, gallery = (
        (features.image_ND[part], features.image_pid_N[part], features.camid_N[part]) for part in (query_Q, gallery_G)
    )
    retrieval = Retrieval(query[0], gallery[0], query[1], gallery[1], query[2], gallery[2])
    return Task("i2i", retrieval, query_Q, gallery_G)


TASKS: dict[TaskKind, Callable[[Features], Task | None]] = {"t2i": t2i_task, "i2t": i2t_task, "i2i": i2i_task}


def rank_task(task: Task) -> QueryRanks:
    """`rank_queries` with the blocks of queries shared out over the ranks; each gets the whole answer."""
    retrieval = task.retrieval
    queries, device = len(task.query_Q), task.query_Q.device
    return QueryRanks.from_table(
        over_ranks(queries, lambda blocks: rank_queries(retrieval, blocks=blocks).table(), device)
    )


def score_task(task: Task, reranking: Reranking | None = None) -> TaskResult:
    """Ranks and metrics of a task. A collective with the same result on every rank.

    Raises:
        UserError: none of its queries has a positive, or the features hold nan or inf.
    """
    if reranking is not None:
        task = replace(task, retrieval=reranking.apply(task.retrieval))
    ranks = rank_task(task)
    return TaskResult(task.kind, reranking, task, ranks, summarise(ranks))


def extract_benchmark(
    encoder: Encoder,
    shards: ShardSet,
    tokenizer: Tokenizer | None,
    size: tuple[int, int],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    split: str = "test",
    cache: ImageCache | None = None,
) -> Features:
    """`extract` of everything that the split's retrieval tasks need."""
    return extract(encoder, shards, require_rows(shards, split), size, tokenizer, batch_size, device, cache)


def evaluate_benchmark(
    encoder: Encoder,
    shards: ShardSet,
    tokenizer: Tokenizer | None,
    size: tuple[int, int],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    split: str = "test",
    cache: ImageCache | None = None,
    reranking: Reranking | None = None,
    wanted: Sequence[TaskKind] = ("t2i", "i2i"),
) -> Pair:
    """Scores one shard set on what its roles allow. A collective with the same result on every rank.

    Returns:
        {"t2i": metrics or None, "i2i": metrics or None} of the wanted tasks: T2I for a set with captions (and a
        tokenizer), I2I for a set with the roles query and gallery. With `reranking`, whose parameters are for the
        caller to tell, also "t2i_reranked" where there is T2I.

    Raises:
        UserError: see `extract`; or no query of a wanted task has a positive.
    """
    features = extract_benchmark(encoder, shards, tokenizer, size, batch_size, device, split, cache)
    tasks = {kind: TASKS[kind](features) for kind in wanted}
    scores: Pair = {kind: None if task is None else score_task(task).metrics for kind, task in tasks.items()}
    captions = tasks.get("t2i")
    if reranking is not None and captions is not None:
        scores["t2i_reranked"] = score_task(captions, reranking).metrics
    return scores


def load_images(shards: ShardSet, rows: Rows, size: tuple[int, int], cache: ImageCache | None = None) -> ImageSet:
    """Decoded images of some rows with their labels, for the closed-form learners; not a collective."""
    images = [
        batch["image_BCHW"].permute(0, 2, 3, 1).contiguous()
        for _, batch in eval_batches(shards, rows, size, 256, cache=cache)
    ]
    index = shards.index[rows]
    return ImageSet(
        torch.cat(images) if images else torch.zeros(0, *size, 3, dtype=torch.uint8),
        torch.from_numpy(index["pid"].astype(np.int64)),
        torch.from_numpy(index["camid"].astype(np.int64)),
        [shards.sample(row).captions for row in rows.tolist()],
    )


def load_baseline_data(
    identity: ShardSet | None,
    captioned: ShardSet | None,
    size: tuple[int, int],
    split: str = "test",
    cache: ImageCache | None = None,
) -> BaselineData:
    """Reads what `baselines.closed_form_baselines` needs.

    Args:
        identity: the I2I set (roles query and gallery); its train split fits the whitening.
        captioned: the T2I set; its train split fits the ridge regression.
        size: (height, width).
        split: the split to score; fitting always uses train.
        cache: decoded images kept by the caller.
    """

    def part(shards: ShardSet | None, of: str, *roles: str) -> ImageSet | None:
        return None if shards is None else load_images(shards, shards.rows(of, roles), size, cache)

    return BaselineData(
        identity_train=part(identity, "train", "train"),
        query=part(identity, split, "query"),
        gallery=part(identity, split, "gallery", "distractor"),
        caption_train=part(captioned, "train", "train"),
        caption_gallery=part(captioned, split, "query", "gallery"),
    )
