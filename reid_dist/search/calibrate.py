"""When is the best hit nobody we know? Scores that people who are not in the index reach in it.

A validation set shows people who are in none of the photographs. Each of its queries is searched in the index, and the
score that only a given share of them exceeds is the threshold: with it, that share of queries for unknown people is
accepted wrongly. It grows with the index, since among more photographs some are more alike: calibrate again after
adding many. What share of known people is then found is measured within the validation set, as the share of queries
whose best photograph of the same person scores at least the threshold.

Shape suffixes: Q queries, G photographs of the validation set, D features.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.transforms import decode_image
from reid_dist.errors import UserError
from reid_dist.files import write_json
from reid_dist.search.index import MANIFEST_FILE, Kind, PhotoIndex
from reid_dist.search.store import changing
from reid_dist.trained import TrainedModel

LEAST_QUERIES = 20  # fewer say nothing about rare events
_BATCH = 64
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Threshold:
    """Of one kind of query.

    Attributes:
        score: a best hit below it is of somebody unknown.
        false_accept: share of queries for unknown people that reach it.
        known_found: share of the validation set's queries for known people that reach it; None without such queries.
        queries: that were searched.
        photographs: in the index at the time.
        weight: of the sentence, where a query is both.
        source: name of the validation set and split.
    """

    score: float
    false_accept: float
    known_found: float | None
    queries: int
    photographs: int
    weight: float | None
    source: str


def calibrate(
    folder: Path, model: TrainedModel, shards: ShardSet, split: str, false_accept: float, most: int = 2000
) -> dict[Kind, Threshold]:
    """Measures the thresholds of an index and writes them into its manifest.

    Args:
        folder: of the index.
        model: of the index.
        shards: validation set, of people who are in no photograph of the index.
        split: of it.
        false_accept: share of queries for unknown people that may be accepted, above 0 and below 1.
        most: queries of each kind that are searched.

    Returns:
        One threshold for each kind of query that the set has enough of; without captions only that of pictures.

    Raises:
        UserError: too few queries for the share asked for, people who are in the index, or an empty index.
    """
    if not 0 < false_accept < 1:
        raise UserError(f"--false-accept {false_accept}: must be above 0 and below 1")
    with changing(folder) as folder:
        index = PhotoIndex.open(folder)
        rows = shards.rows(split)
        source = f"{shards.name} {split}"
        if len(index.entries) == 0:
            raise UserError(f"{folder}: holds no photographs; index some first")
        _check(index, shards, rows, source, false_accept, most)
        pid_G = shards.index["pid"][rows]
        image_GD = _images(model, shards, rows)
        found: dict[Kind, Threshold] = {}
        for kind, query_QD, own_Q in _queries(model, shards, rows, image_GD, most, false_accept):
            score_Q = _best(index, query_QD, kind)
            threshold = float(np.quantile(score_Q, 1 - false_accept, method="higher"))
            threshold = float(np.nextafter(np.float32(threshold), np.float32(2)))  # that one query is not to reach it
            found[kind] = Threshold(
                score=threshold,
                false_accept=float((score_Q >= threshold).mean()),
                known_found=_known_found(query_QD, own_Q, image_GD, pid_G, threshold),
                queries=len(query_QD),
                photographs=len(index.entries),
                weight=0.5 if kind == "both" else None,
                source=source,
            )
        thresholds: dict[str, Any] = {kind: asdict(each) for kind, each in found.items()}
        write_json(folder / MANIFEST_FILE, {**index.manifest, "thresholds": thresholds})
        return found


def _check(index: PhotoIndex, shards: ShardSet, rows: Rows, source: str, false_accept: float, most: int) -> None:
    queries = min(len(rows), most)
    if not _enough(queries, false_accept):
        few = f"{queries} images are too few for --false-accept {false_accept}"
        raise UserError(f"{source}: {few}; use a larger set, or another --split")
    people = {shards.identities[pid] for pid in shards.index["pid"][rows].tolist()}
    shared = sorted(people & set(index.entries.persons))
    if shared:
        raise UserError(
            f"{source}: {len(shared)} of its people are in the index too, first {shared[0]}; a validation set must"
            " show nobody who is in it"
        )


def _enough(queries: int, false_accept: float) -> bool:
    """Whether one of so many queries is not more than the share that is asked for."""
    return queries >= LEAST_QUERIES and queries * false_accept >= 1


def _images(model: TrainedModel, shards: ShardSet, rows: Rows) -> Floats:
    parts = []
    for begin in tqdm(range(0, len(rows), _BATCH), desc="features", unit="batch", disable=None):
        some = rows[begin : begin + _BATCH].tolist()
        images = [decode_image(shards.image_bytes(row), model.image_size, shards.describe(row)) for row in some]
        parts.append(model.encode_image(images, batch_size=_BATCH).cpu().numpy())
    return np.concatenate(parts)


def _queries(
    model: TrainedModel, shards: ShardSet, rows: Rows, image_GD: Floats, most: int, false_accept: float
) -> list[tuple[Kind, Floats, npt.NDArray[np.int64]]]:
    """(kind, features, number of the photograph that the query is or speaks of) for each kind. Spread over the rows."""
    own_Q = np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)
    queries: list[tuple[Kind, Floats, npt.NDArray[np.int64]]] = [("image", image_GD[own_Q], own_Q)]
    told = own_Q[shards.index["captions"][rows[own_Q]] > 0]
    if _enough(len(told), false_accept):
        captions = [shards.sample(int(rows[own])).captions[0] for own in told]
        text_QD = model.encode_text(captions).cpu().numpy()
        sum_QD = text_QD + image_GD[told]
        both_QD = (sum_QD / np.linalg.norm(sum_QD, axis=1, keepdims=True)).astype(np.float32)
        queries += [("text", text_QD, told), ("both", both_QD, told)]
    return queries


def _best(index: PhotoIndex, query_QD: Floats, kind: Kind) -> Floats:
    shown = tqdm(query_QD, desc=f"{kind} queries", unit="query", disable=None)
    return np.array([index.search(query_D, 1)[0].score for query_D in shown], dtype=np.float32)


def _known_found(
    query_QD: Floats, own_Q: npt.NDArray[np.int64], image_GD: Floats, pid_G: npt.NDArray[np.int32], threshold: float
) -> float | None:
    """Share of queries for which another photograph of the same person reaches the threshold."""
    reached = []
    for query_D, own in zip(query_QD, own_Q.tolist(), strict=True):
        same = np.flatnonzero(pid_G == pid_G[own])
        same = same[same != own]
        if len(same):
            reached.append(bool((image_GD[same] @ query_D).max() >= threshold))
    return float(np.mean(reached)) if reached else None
