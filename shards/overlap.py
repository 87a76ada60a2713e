"""`python -m shards.overlap --train DIR... --eval DIR... --out exclude.txt`: test people inside training sets.

Some data sets were cut from others: CUHK-PEDES holds Market-1501, ICFG-PEDES and RSTPReid hold MSMT17. A training
identity that shares an image with a val or test split goes into the list, with all its images. Images are the same
when their files, their pixels or their distinctive file names agree; a copy that was resized or compressed anew AND
renamed is not found.
"""

import argparse
import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from reid_dist.data.cache import Images
from reid_dist.data.exclude import EXCLUDABLE
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.sample import ROLES, SPLITS
from reid_dist.errors import UserError
from shards.index import write_file
from shards.raw import IMAGE_SUFFIXES

CRITERIA = ("bytes", "pixels", "name")

_FIRST_LINE = "# Identities that are not to be trained on, by shards.overlap"
# Person, camera, sequence, frame and box of Market-1501: kept by the sets that were cut from it.
_MARKET_NAME = re.compile(r"(?<!\d)\d{4}_c\ds\d_\d{6}_\d{2}(?!\d)")
# Shorter names, 0001_c1.jpg and the like, are those of different images in many sets.
_DISTINCTIVE = 12

Size = tuple[int, int]


@dataclass(eq=False)
class Side:
    """The images of one set that are compared: those of its training split, or those it is evaluated with.

    Attributes:
        use: "train" or "eval".
        shards: the set.
        rows: rows of the set. Shape: (N,).
        pids: identity of each image.
        sizes: (height, width) of each image.
        marks: for each criterion, what is equal in copies of an image; None is equal to nothing.
    """

    use: str
    shards: ShardSet
    rows: Rows
    pids: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    marks: dict[str, list[str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise UserError(f"--{self.use} {self.shards.path}: has no images for that; leave the set out")


@dataclass(frozen=True)
class Overlap:
    """What a training set shares with an evaluation set.

    Attributes:
        train: folder of the training set.
        evaluation: folder of the other.
        images: training images that are in both, for each criterion.
        pids: their identities.
    """

    train: Path
    evaluation: Path
    images: dict[str, int]
    pids: frozenset[str]


def find_overlaps(train: Iterable[Path], evaluation: Iterable[Path]) -> list[Overlap]:
    """Compare every training set with every evaluation set, but none with itself.

    Args:
        train: shard folders; their training split is looked at.
        evaluation: shard folders; val and test split but for junk, which no ranking holds.

    Raises:
        UserError: a folder is no shard set or has no such images, or an image does not decode.
    """
    opened: dict[Path, ShardSet] = {}
    train_sides = [Side("train", each, each.rows("train")) for each in _open(train, opened)]
    eval_sides = [Side("eval", each, _evaluated(each)) for each in _open(evaluation, opened)]
    pairs = [(one, other) for one in train_sides for other in eval_sides if one.shards is not other.shards]
    partners: dict[Side, list[Side]] = {}
    for one, other in pairs:
        partners.setdefault(one, []).append(other)
        partners.setdefault(other, []).append(one)
    for side in partners:
        _read_records(side)
    for side, others in partners.items():
        _hash_pixels(side, {size for other in others for size in other.sizes})
    return [_compare(one, other) for one, other in pairs]


def source_name(source: str) -> str | None:
    """What identifies an image by its file name; None when the name says too little.

    Args:
        source: path inside the raw tree, with slashes.

    Returns:
        The Market-1501 name inside it, or else the whole name without suffix when it has at least 12 characters.
    """
    name = PurePosixPath(source)
    while name.suffix.lower() in IMAGE_SUFFIXES:  # .jpg.jpg occurs
        name = name.with_suffix("")
    found = _MARKET_NAME.search(name.name)
    if found:
        return found.group()
    return name.name if len(name.name) >= _DISTINCTIVE else None


def table(overlaps: Sequence[Overlap]) -> list[str]:
    """A line for each comparison under a head, in columns."""
    head = ["train set", "eval set", *(f"same {criterion}" for criterion in CRITERIA), "identities excluded"]
    cells = [
        [str(each.train), str(each.evaluation), *map(str, each.images.values()), str(len(each.pids))]
        for each in overlaps
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for row in (head, *cells):
        padded = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def write_exclusions(path: Path, pids: Iterable[str], comments: Iterable[str]) -> None:
    """Write an exclusion list for `read_exclusions`, whole or not at all.

    Args:
        path: the file.
        pids: identities, written sorted.
        comments: lines for its head.

    Raises:
        UserError: an identity cannot stand in such a list.
    """
    listed = sorted(set(pids))
    for pid in listed:
        if not EXCLUDABLE.fullmatch(pid):
            raise UserError(f"{path}: identity {pid!r} holds white space; write its set again with other raw ids")
    # Split once more: a file name may hold a line break.
    head = [f"# {line}" for comment in comments for line in comment.splitlines()]
    text = "".join(line + "\n" for line in (_FIRST_LINE, *head, *listed))
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def _open(paths: Iterable[Path], opened: dict[Path, ShardSet]) -> list[ShardSet]:
    """The sets of some folders: one object for a folder, however it is named and on whichever side."""
    chosen: dict[Path, ShardSet] = {}
    for path in paths:
        place = path.resolve()
        if place not in opened:
            opened[place] = ShardSet(path)
        chosen[place] = opened[place]
    return list(chosen.values())


def _evaluated(shards: ShardSet) -> Rows:
    index = shards.index
    chosen = (index["split"] != SPLITS.index("train")) & (index["role"] != ROLES.index("junk"))
    return np.flatnonzero(chosen).astype(np.int64)


def _read_records(side: Side) -> None:
    shards = side.shards
    digests: list[str | None] = []
    names: list[str | None] = []
    for row in _progress(side, side.rows.tolist(), "records"):
        sample = shards.sample(row)
        side.sizes.append((sample.height, sample.width))
        digests.append(sample.sha256)
        names.append(source_name(sample.source))
    # From the index, as training takes them from there.
    side.pids = [shards.identities[pid] for pid in shards.index["pid"][side.rows].tolist()]
    side.marks.update(bytes=digests, name=names)


def _hash_pixels(side: Side, sizes: set[Size]) -> None:
    """Decode the images that have one of some sizes: no other can have a twin."""
    marks: list[str | None] = [None] * len(side.rows)
    chosen = [position for position, size in enumerate(side.sizes) if size in sizes]
    for position in _progress(side, chosen, "pixels"):
        size = side.sizes[position]
        pixels = Images(side.shards, size)(int(side.rows[position]))
        marks[position] = hashlib.sha256(f"{size}".encode() + pixels.tobytes()).hexdigest()
    side.marks["pixels"] = marks


def _progress(side: Side, numbers: list[int], what: str) -> Iterable[int]:
    description = f"{side.shards.name} ({side.use}): {what}"
    return tqdm(numbers, desc=description, unit=" images", disable=None)


def _compare(train: Side, evaluation: Side) -> Overlap:
    images: dict[str, int] = {}
    pids: set[str] = set()
    for criterion in CRITERIA:
        known = set(evaluation.marks[criterion]) - {None}
        shared = [position for position, mark in enumerate(train.marks[criterion]) if mark in known]
        images[criterion] = len(shared)
        pids.update(train.pids[position] for position in shared)
    return Overlap(train.shards.path, evaluation.shards.path, images, frozenset(pids))


def _prepare(path: Path) -> None:
    """Make room for the list, or refuse to write over something else, before the long work and not after it."""
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file, such as {path / 'exclude.txt'}")
    if path.exists() and not path.read_bytes().startswith(_FIRST_LINE.encode()):
        raise UserError(f"--out {path}: exists and is not from this program; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m shards.overlap", description="List training identities that share an image with a test split."
    )
    parser.add_argument("--train", nargs="+", required=True, type=Path, help="shard folders to train on")
    parser.add_argument("--eval", nargs="+", required=True, type=Path, help="shard folders to evaluate with")
    parser.add_argument("--out", required=True, type=Path, help="list to write, for data.exclude")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _prepare(options.out)
        overlaps = find_overlaps(options.train, options.eval)
        pids = {pid for each in overlaps for pid in each.pids}
        lines = [*table(overlaps), f"identities excluded in all: {len(pids)}"]
        write_exclusions(options.out, pids, [f"{parser.prog} {shlex.join(given)}", *lines])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, missing rights
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, f"{options.out}: written"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
