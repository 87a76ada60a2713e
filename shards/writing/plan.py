"""Which sample goes into which shard, decided before any image is read.

The plan follows from the raw tree and the options alone, so every shard can be written by itself: by any process, in
any order, again after a crash.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from reid_dist.data.exclude import Exclusions
from reid_dist.errors import UserError
from shards.raw import RawSample, sample_key

Order = Literal["shuffled", "identity"]
ORDERS: tuple[Order, ...] = get_args(Order)

# Two tar headers, their padding and a JSON record of usual length.
PLANNED_OVERHEAD = 1_536
# Enough for a good mix, and few enough that a shard's images come from few groups.
WINDOW = 50_000

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample with its key in the set."""

    key: str
    raw: RawSample

    def pid(self, dataset: str) -> str:
        """The namespaced identity; a pair without one is its own."""
        return f"{dataset}:{self.key if self.raw.pid is None else self.raw.pid}"


@dataclass(frozen=True)
class Plan:
    """The shards of a set.

    Attributes:
        dataset: name of the set.
        entries: all samples that are kept, by source.
        shards: for each shard the positions of its samples in `entries`, in the order of the tar.
        excluded: samples that were left out because of their identity.
    """

    dataset: str
    entries: Sequence[Entry]
    shards: Sequence[IntArray]
    excluded: int

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{self.dataset}-{shard:06d}.tar"

    def entries_of(self, shard: int) -> list[Entry]:
        """The samples of a shard."""
        return [self.entries[position] for position in self.shards[shard].tolist()]


def plan_shards(
    samples: Iterable[RawSample], dataset: str, exclusions: Exclusions, order: Order, seed: int, shard_bytes: int
) -> Plan:
    """Put samples into an order and cut it into shards.

    Args:
        samples: in any order.
        dataset: name of the set.
        exclusions: identities to leave out; images are known by their content only when they are read.
        order: "shuffled", so that a stream reads them mixed, or "identity": the images of an identity stand together,
            the identities are shuffled.
        seed: of the order.
        shard_bytes: size that a shard should not exceed.

    Raises:
        UserError: a source occurs twice or is not UTF-8, or nothing is left.
    """
    # By path first: the order of a folder's listing must not decide. Keys before exclusion: they must not depend on it.
    taken: set[str] = set()
    listed = sorted(samples, key=lambda sample: sample.source)
    for one, other in pairwise(listed):
        if one.source == other.source:
            raise UserError(f"{one.source}: named twice in the raw data; remove one of the entries")
    for sample in listed:
        _require_utf8(sample.source)
    entries = [Entry(sample_key(sample.source, taken), sample) for sample in listed]
    kept = [entry for entry in entries if entry.pid(dataset) not in exclusions.pids]
    if not kept:
        raise UserError(f"--exclude: the list leaves nothing of {dataset}; take another one")
    rng = np.random.Generator(np.random.PCG64(seed))
    units = _by_identity(kept, rng) if order == "identity" else ([position] for position in _shuffled(kept, rng))
    return Plan(dataset, kept, list(_cut(kept, units, shard_bytes)), len(entries) - len(kept))


def _require_utf8(source: str) -> None:
    """Python reads any bytes as a file's name, but a record cannot hold them."""
    try:
        source.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source!a}: the name of the file is not UTF-8; rename it") from None


def _shuffled(entries: Sequence[Entry], rng: np.random.Generator) -> Iterator[int]:
    """All positions, shuffled; where images come in groups (of a parquet file), groups and then windows of them."""
    groups: dict[str, list[int]] = {}
    for position, entry in enumerate(entries):
        groups.setdefault(entry.raw.image.group, []).append(position)
    if len(groups) == 1:
        yield from rng.permutation(len(entries)).tolist()
        return
    # Images without a group can stand anywhere: each is its own.
    runs = [[position] for position in groups.pop("", [])] + list(groups.values())
    window: list[int] = []
    for number in rng.permutation(len(runs)).tolist():
        window += runs[number]
        if len(window) >= WINDOW:
            yield from rng.permutation(window).tolist()
            window = []
    yield from rng.permutation(window).tolist()


def _by_identity(entries: Sequence[Entry], rng: np.random.Generator) -> list[list[int]]:
    """The positions of each identity, identities shuffled."""
    members: dict[str, list[int]] = {}
    for position, entry in enumerate(entries):
        members.setdefault(entry.key if entry.raw.pid is None else f"{entry.raw.pid}:", []).append(position)
    runs = list(members.values())
    return [runs[number] for number in rng.permutation(len(runs)).tolist()]


def _cut(entries: Sequence[Entry], units: Iterable[Sequence[int]], shard_bytes: int) -> Iterator[IntArray]:
    """Shards of about `shard_bytes`; a unit is only split where it is larger than a shard."""
    shard: list[int] = []
    filled = 0
    for unit in units:
        sizes = [entries[position].raw.image.size + PLANNED_OVERHEAD for position in unit]
        if shard and filled + sum(sizes) > shard_bytes:
            yield np.array(shard, dtype=np.int64)
            shard, filled = [], 0
        for position, size in zip(unit, sizes, strict=True):
            if shard and filled + size > shard_bytes:
                yield np.array(shard, dtype=np.int64)
                shard, filled = [], 0
            shard.append(position)
            filled += size
    yield np.array(shard, dtype=np.int64)
