"""Training data that holds what a benchmark asks for: found from indexes and cards alone, before a run starts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reid_dist.data.exclude import NOTHING, Exclusions
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.sample import ROLES, SPLITS

_REMEDY = (
    "write a list with `python -m shards.verify --overlap DIR... --out exclude.txt` for data.exclude, or leave one of "
    "the sets out"
)


def find_contamination(
    train: Sequence[ShardSet], evaluation: Sequence[ShardSet], excluded: Exclusions = NOTHING
) -> list[str]:
    """What training sets share with evaluation sets, but no set with itself.

    Stored images are compared by the hashes in the indexes. Copies that were compressed anew have other hashes: sets
    that by their cards were cut from one another count as shared until an exclusion list that was made of both leaves
    out some image of one of the two, as that of `shards.verify --overlap` does, which compares pixels and names too.

    Args:
        train: sets whose training split is trained on.
        evaluation: sets that are scored.
        excluded: what is not trained on.

    Returns:
        One line for each pair of sets that share something: how much, and the remedy; empty when all is well.
    """
    tested = [(shards, _digests(shards, evaluated_rows(shards))) for shards in _distinct(evaluation)]
    found = []
    for trained in _distinct(train):
        digests = _digests(trained, excluded.keeps(trained, trained.rows("train")))
        for other, known in tested:
            if not same_set(trained, other):
                line = _shared_images(trained, digests, other, known) or _shared_origin(trained, other, excluded)
                found += [line] if line else []
    return found


def evaluated_rows(shards: ShardSet) -> Rows:
    """Rows of the val and test split but for junk, which no ranking holds."""
    index = shards.index
    chosen = (index["split"] != SPLITS.index("train")) & (index["role"] != ROLES.index("junk"))
    return np.flatnonzero(chosen).astype(np.int64)


def same_set(one: ShardSet, other: ShardSet) -> bool:
    """Whether two sets hold the same tars, wherever they lie: a set's own splits are for its authors to keep apart."""
    return one is other or _content(one) == _content(other)


def origins(shards: ShardSet) -> frozenset[str]:
    """Converters of the sets whose people a set shows, its own among them, as the card says; none if it was drawn."""
    card = shards.manifest.card
    if card.get("world") is not None:
        return frozenset()
    contains = card.get("contains", [])
    names = [card.get("converter"), *(contains if isinstance(contains, list) else [])]
    return frozenset(name for name in names if isinstance(name, str))


def shared_origins(one: ShardSet, other: ShardSet) -> list[str]:
    """Sets that both show people of, by their cards; sorted, empty for two copies of one set."""
    if one.manifest.card.get("converter") == other.manifest.card.get("converter"):
        return []
    return sorted(origins(one) & origins(other))


def _content(shards: ShardSet) -> tuple[Any, ...]:
    manifest = shards.manifest
    return manifest.dataset, manifest.index_sha256, [shard.sha256 for shard in manifest.shards]


def _distinct(sets: Sequence[ShardSet]) -> list[ShardSet]:
    kept: list[ShardSet] = []
    for each in sets:
        if not any(same_set(each, other) for other in kept):
            kept.append(each)
    return kept


def _digests(shards: ShardSet, rows: Rows) -> npt.NDArray[np.uint64]:
    return np.unique(shards.index["image_digest"][rows])


def _shared_images(
    trained: ShardSet, digests: npt.NDArray[np.uint64], tested: ShardSet, known: npt.NDArray[np.uint64]
) -> str:
    count = len(np.intersect1d(digests, known, assume_unique=True))
    if not count:
        return ""
    return f"{trained.shown}: {count} images to train on are also in the val or test split of {tested.shown}; {_REMEDY}"


def _shared_origin(trained: ShardSet, tested: ShardSet, excluded: Exclusions) -> str:
    shared = shared_origins(trained, tested)
    # A list speaks for two sets when it was made by comparing them and found something to leave out of either.
    compared = {trained.manifest.index_sha256, tested.manifest.index_sha256} <= excluded.compared
    if not shared or (compared and any(_leaves_out(excluded, each) for each in (trained, tested))):
        return ""
    return (
        f"{trained.shown}: shows people of {', '.join(shared)}, and so does {tested.shown}, on which it "
        f"would be tested, and no list that was made of both leaves out what they share; {_REMEDY}"
    )


def _leaves_out(excluded: Exclusions, shards: ShardSet) -> bool:
    rows = shards.rows("train")
    return len(excluded.keeps(shards, rows)) < len(rows)
