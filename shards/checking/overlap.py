"""Test people inside training sets: what `python -m shards.verify --overlap DIR...` looks for.

Some data sets were cut from others: CUHK-PEDES holds Market-1501, ICFG-PEDES and RSTPReid hold MSMT17. A training
identity that shares an image with a val or test split goes into the list, with all its images. Images are the same
when their files, their pixels or their distinctive file names agree; a copy that was resized or compressed anew AND
renamed is not found, so what the cards say of common origins is reported beside it.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from tqdm import tqdm

from reid_dist.data.cache import Images
from reid_dist.data.contamination import evaluated_rows, same_set, shared_origins
from reid_dist.data.exclude import COMPARED, EXCLUDABLE
from reid_dist.data.reader import Rows, ShardSet
from reid_dist.errors import UserError
from shards.raw import IMAGE_SUFFIXES
from shards.workers import Progress, run_jobs
from shards.writing.files import write_file

CRITERIA = ("bytes", "pixels", "name")

_FIRST_LINE = "# Identities that are not to be trained on, by shards.verify --overlap"
# Kept by the sets that were cut from them: person, camera, sequence, frame and box of Market-1501; person, number,
# camera, date with time of day, frame and box of MSMT17.
_KNOWN_NAMES = re.compile(
    r"(?<!\d)(?:\d{4}_c\ds\d_\d{6}_\d{2}|\d{4}_\d{3}_\d{2}_\d{4}(?:morning|noon|afternoon)_\d{4}_\d{1,2})(?!\d)"
)
# Shorter names, 0001_c1.jpg and the like, are those of different images in many sets.
_DISTINCTIVE = 12
_JOB = 2048

Size = tuple[int, int]
Result = TypeVar("Result")


@dataclass(eq=False)
class Side:
    """The images of one set that are compared: those of its training split, or those it is evaluated with.

    Attributes:
        use: "train" or "eval".
        shards: the set.
        rows: rows of the set. Shape: (N,).
        sizes: (height, width) of each image.
        marks: for each criterion, what is equal in copies of an image; None is equal to nothing.
    """

    use: str
    shards: ShardSet
    rows: Rows
    sizes: list[Size] = field(default_factory=list)
    marks: dict[str, list[str | int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Overlap:
    """What a training set shares with an evaluation set.

    Attributes:
        train: folder of the training set.
        evaluation: folder of the other.
        images: training images that are in both, for each criterion.
        pids: their identities.
        origins: sets that both show people of, by their cards.
    """

    train: str
    evaluation: str
    images: dict[str, int]
    pids: frozenset[str]
    origins: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.pids)


@dataclass(frozen=True)
class _Job:
    """Some images of one side: their records, or (with `sizes`) their pixels."""

    number: int
    location: str
    rows: list[int]
    sizes: list[Size] = field(default_factory=list)


def find_overlaps(folders: Iterable[str], workers: int = 1) -> list[Overlap]:
    """Compare the training split of every set with the val and test split of every other, but none with itself.

    Args:
        folders: shard sets, paths or URLs; a copy of a set counts as the same. Junk is left out: no ranking
            holds it.
        workers: processes.

    Raises:
        UserError: a folder is no shard set, no two of them can be compared, or an image does not decode.
    """
    sets: list[ShardSet] = []
    for opened in map(ShardSet, folders):
        if not any(same_set(opened, other) for other in sets):
            sets.append(opened)
    train_sides = [Side("train", each, each.rows("train")) for each in sets]
    eval_sides = [Side("eval", each, evaluated_rows(each)) for each in sets]
    pairs = [
        (one, other)
        for one in train_sides
        for other in eval_sides
        if one.shards is not other.shards and len(one.rows) and len(other.rows)
    ]
    if not pairs:
        names = ", ".join(each.shown for each in sets)
        raise UserError(f"{names}: nothing to compare; name two sets, one with a training and one with a test split")
    partners: dict[Side, list[Side]] = {}
    for one, other in pairs:
        partners.setdefault(one, []).append(other)
        partners.setdefault(other, []).append(one)
    for side in partners:
        _read_records(side, workers)
    for side, others in partners.items():
        _hash_pixels(side, {size for other in others for size in other.sizes}, workers)
    return [_compare(one, other) for one, other in pairs]


def unrecognised(overlaps: Sequence[Overlap]) -> list[Overlap]:
    """Sets with people in common, by their cards, of which no image can be told: the copies are not to be found."""
    told = {frozenset((each.train, each.evaluation)) for each in overlaps if each}
    return [each for each in overlaps if each.origins and frozenset((each.train, each.evaluation)) not in told]


def source_name(source: str) -> str | None:
    """What identifies an image by its file name; None when the name says too little.

    Args:
        source: path inside the raw tree, with slashes.

    Returns:
        The Market-1501 or MSMT17 name inside it, or else the whole name without suffix when it has at least 12
        characters.
    """
    name = PurePosixPath(source)
    while name.suffix.lower() in IMAGE_SUFFIXES:  # .jpg.jpg occurs
        name = name.with_suffix("")
    found = _KNOWN_NAMES.search(name.name)
    if found:
        return found.group()
    return name.name if len(name.name) >= _DISTINCTIVE else None


def table(overlaps: Sequence[Overlap]) -> list[str]:
    """A line for each comparison under a head, in columns."""
    same = (f"same {criterion}" for criterion in CRITERIA)
    head = ["train set", "eval set", *same, "identities excluded", "both show people of"]
    cells = [
        [each.train, each.evaluation, *map(str, each.images.values()), str(len(each.pids)), ", ".join(each.origins)]
        for each in overlaps
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for row in (head, *cells):
        padded = [
            cell.rjust(width) if 2 <= column <= len(CRITERIA) + 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def prepare_list(path: Path) -> None:
    """Make room for a list, or refuse to write over something else, before the long work and not after it.

    Raises:
        UserError: the path is a folder, or a file that this program did not write.
    """
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file, such as {path / 'exclude.txt'}")
    if path.exists() and not path.read_bytes().startswith(_FIRST_LINE.encode()):
        raise UserError(f"--out {path}: exists and is not from this program; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_exclusions(path: Path, pids: Iterable[str], compared: Iterable[ShardSet], comments: Iterable[str]) -> None:
    """Write an exclusion list for `read_exclusions`, whole or not at all.

    Args:
        path: the file.
        pids: identities, written sorted.
        compared: sets that the list speaks for.
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
    head += [COMPARED.format(shards.name, shards.manifest.index_sha256) for shards in compared]
    text = "".join(line + "\n" for line in (_FIRST_LINE, *head, *listed))
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def _read_records(side: Side, workers: int) -> None:
    """Sizes, names and digests; the digests stand in the index."""
    found = _run(_records_of, side, side.rows.tolist(), [], "records", workers)
    side.sizes = [size for size, _ in found]
    side.marks["name"] = [name for _, name in found]
    side.marks["bytes"] = side.shards.index["image_digest"][side.rows].tolist()


def _hash_pixels(side: Side, sizes: set[Size], workers: int) -> None:
    """Decode the images that have one of some sizes: no other can have a twin."""
    marks: list[str | int | None] = [None] * len(side.rows)
    chosen = [position for position, size in enumerate(side.sizes) if size in sizes]
    rows = [int(side.rows[position]) for position in chosen]
    hashes = _run(_pixels_of, side, rows, [side.sizes[position] for position in chosen], "pixels", workers)
    for position, mark in zip(chosen, hashes, strict=True):
        marks[position] = mark
    side.marks["pixels"] = marks


def _records_of(job: _Job, progress: Progress) -> tuple[int, list[tuple[Size, str | None]]]:
    shards, found = _opened(job.location), []
    for row in job.rows:
        sample = shards.sample(row)
        found.append(((sample.height, sample.width), source_name(sample.source)))
        progress(1)
    return job.number, found


def _pixels_of(job: _Job, progress: Progress) -> tuple[int, list[str]]:
    images = functools.cache(lambda size: Images(_opened(job.location), size))
    found = []
    for row, size in zip(job.rows, job.sizes, strict=True):
        found.append(hashlib.sha256(f"{size}".encode() + images(size)(row).tobytes()).hexdigest())
        progress(1)
    return job.number, found


def _run(
    function: Callable[[_Job, Progress], tuple[int, list[Result]]],
    side: Side,
    rows: list[int],
    sizes: list[Size],
    what: str,
    workers: int,
) -> list[Result]:
    """What a function returns for each row, in their order."""
    location = side.shards.location
    jobs = [
        _Job(start, location, rows[start : start + _JOB], sizes[start : start + _JOB])
        for start in range(0, len(rows), _JOB)
    ]
    with tqdm(total=len(rows), desc=f"{side.shards.name} ({side.use}): {what}", unit=" images", disable=None) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        parts = dict(run_jobs(function, jobs, min(workers, len(jobs)), advance))
    return [each for start in sorted(parts) for each in parts[start]]


@functools.lru_cache(maxsize=2)
def _opened(location: str) -> ShardSet:
    """A set in the process of a job: sent with every job, its index would cost more than the work."""
    return ShardSet(location)


def _compare(train: Side, evaluation: Side) -> Overlap:
    images: dict[str, int] = {}
    pids: set[str] = set()
    # From the index, as training takes them from there.
    numbers = train.shards.index["pid"][train.rows].tolist()
    drawn = any(side.shards.manifest.card.get("world") is not None for side in (train, evaluation))
    for criterion in CRITERIA:
        # The procedural world names its images in the manner of the real sets: its names identify nothing.
        known = set() if drawn and criterion == "name" else set(evaluation.marks[criterion]) - {None}
        shared = [position for position, mark in enumerate(train.marks[criterion]) if mark in known]
        images[criterion] = len(shared)
        pids.update(train.shards.identities[numbers[position]] for position in shared)
    return Overlap(
        train.shards.shown,
        evaluation.shards.shown,
        images,
        frozenset(pids),
        tuple(shared_origins(train.shards, evaluation.shards)),
    )
