"""Checking a whole shard set: manifest, index and records, then every tar, then what only shows over all of them."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from tqdm import tqdm

from reid_dist.data.sample import (
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    RECORDS_NAME,
    ROLES,
    SPLITS,
    Manifest,
)
from reid_dist.errors import UserError
from shards.checking.captions import CaptionCounts, TokenizerChoice, count_captions, shared_mask
from shards.checking.shard import Damage, ShardFindings, ShardJob, check_shard
from shards.raw import Counts
from shards.workers import processors, run_jobs

Index = npt.NDArray[Any]

# Samples that are checked in the time that a process takes to start.
_SAMPLES_PER_START = 5_000
_NOT_PEOPLE = [ROLES.index("distractor"), ROLES.index("junk")]


@dataclass
class Report:
    """What was found in one set.

    Attributes:
        folder: of the set.
        remedy: what to do about damage.
        damage: everything that is wrong.
        manifest: None where it cannot be read.
        splits: found images, identities, captions and cameras of each split.
        parts: found counts of each part that the set's authors published counts of.
        published: those; empty: nothing is published, or a program drew the set.
        duplicates: "copies": images beyond the first of each content; "identities": images that stand under several
            identities; "splits": images that are in the training split and in another.
        captions: of each split that has some.
        cut: captions that the tokenizer would cut; None: not counted.
        beside: members of foreign tars that the index does not name.
    """

    folder: Path
    remedy: str = ""
    damage: list[Damage] = field(default_factory=list)
    manifest: Manifest | None = None
    splits: dict[str, Counts] = field(default_factory=dict)
    parts: dict[str, Counts] = field(default_factory=dict)
    published: dict[str, Counts] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    captions: dict[str, CaptionCounts] = field(default_factory=dict)
    cut: int | None = None
    beside: int = 0

    def add(self, place: str, what: str) -> None:
        """Note a damage."""
        self.damage.append(Damage(place, what))


def verify_set(
    folder: Path, tokenizer: TokenizerChoice | None = None, expect: bool = False, workers: int | None = None
) -> Report:
    """Check a set; nothing is changed.

    Args:
        folder: with manifest and index, written by `shards.write` or `shards.index build`.
        tokenizer: whose cuts to count; None counts none.
        expect: other counts than the published ones are damage.
        workers: processes; None: all processors, for a small set fewer.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such shard folder; name one that `python -m shards.write` made")
    report = Report(
        folder, f"remove the folder and write it with `python -m shards.write NAME --root RAW --out {folder}`"
    )
    manifest = report.manifest = _read_manifest(report)
    if manifest is None:
        return report
    if manifest.records_sha256:
        report.remedy = f"get the tar again and index it anew with `python -m shards.index build DIR --out {folder}`"
        _check_hash(report, RECORDS_NAME, manifest.records_sha256)
    else:
        report.remedy = f"copy the file again, or {report.remedy}"
        _check_strays(report, manifest)
    index = _read_index(report, manifest)
    report.published = published_counts(manifest)
    jobs = _jobs(report, manifest, index, tokenizer)
    workers = workers or min(processors(), 1 + manifest.samples // _SAMPLES_PER_START)
    results = _results(jobs, workers, f"{manifest.dataset}: checking")
    for found in results:
        report.damage += found.damage
        report.beside += found.beside
    if index is not None:
        _check_counts(report, manifest, index)
        _check_keys(report, manifest, index, results)
        _count(report, index, results)
        _compare_published(report, expect)
    if tokenizer is not None:
        report.cut = sum(found.cut for found in results)
    return report


def published_counts(manifest: Manifest) -> dict[str, Counts]:
    """The counts that a set's authors published, by part; none for a set that a program drew."""
    from shards.write import CONVERTERS  # here: it knows every data set

    card = manifest.card
    converter = CONVERTERS.get(str(card.get("converter")))
    if converter is None or card.get("world") is not None:
        return {}
    return converter.EXPECTED.get(str(card.get("variant")), next(iter(converter.EXPECTED.values())))


def _read_manifest(report: Report) -> Manifest | None:
    path = report.folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        report.add(MANIFEST_NAME, f"cannot be read ({error.strerror}), so this is no complete shard set")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        report.add(MANIFEST_NAME, f"is not valid ({place}: {first['msg']})")
    return None


def _check_hash(report: Report, name: str, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with (report.folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        report.add(name, f"cannot be read ({error.strerror})")
        return
    if expected and digest.hexdigest() != expected:
        report.add(name, f"its sha256 is not the one in {MANIFEST_NAME}")


def _check_strays(report: Report, manifest: Manifest) -> None:
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(report.folder.glob("*.tar")):
        if path.name not in listed:
            report.add(path.name, f"lies in the folder, but {MANIFEST_NAME} does not list it")


def _read_index(report: Report, manifest: Manifest) -> Index | None:
    """The index as far as it can be used; None when it cannot."""
    _check_hash(report, INDEX_NAME, manifest.index_sha256)
    try:
        index: Index = np.load(io.BytesIO((report.folder / INDEX_NAME).read_bytes()), allow_pickle=False)
    except OSError:
        return None
    except (ValueError, EOFError, MemoryError) as error:
        report.add(INDEX_NAME, f"is not readable ({error})")
        return None
    if not isinstance(index, np.ndarray) or index.dtype != INDEX_DTYPE or index.ndim != 1:
        report.add(INDEX_NAME, "has another dtype or shape")
        return None
    for what in _index_problems(index, manifest):
        report.add(INDEX_NAME, what)
    return index


def _index_problems(index: Index, manifest: Manifest) -> Iterator[str]:
    if len(index) != manifest.samples:
        yield f"{len(index)} rows for the {manifest.samples} samples of {MANIFEST_NAME}"
    ranges = {
        "shard": (0, len(manifest.shards)),
        "pid": (0, len(manifest.identities)),
        "camid": (-1, 1 << 31),
        "split": (0, len(SPLITS)),
        "role": (0, len(ROLES)),
        "captions": (0, 1 << 31),
        "image_size": (0, MAX_IMAGE_BYTES + 1),
        "json_size": (0, MAX_JSON_BYTES + 1),
        "image_offset": (0, 1 << 62),
        "json_offset": (0, 1 << 62),
    }
    for column, (least, end) in ranges.items():
        values = index[column].astype(np.int64)
        wrong = np.flatnonzero((values < least) | (values >= end))
        if len(wrong):
            yield f"{column} {values[wrong[0]]} in row {wrong[0]} ({len(wrong)} such rows) is outside [{least}, {end})"
    for number, shard in enumerate(manifest.shards):
        rows = int((index["shard"] == number).sum())
        if rows != shard.samples:
            yield f"{rows} rows for the {shard.samples} samples of shard {shard.name}"
    order = np.lexsort((index["image_offset"], index["shard"]))
    if not np.array_equal(order, np.arange(len(index))):
        yield "its rows are not in the order of the tars"


def _jobs(report: Report, manifest: Manifest, index: Index | None, tokenizer: TokenizerChoice | None) -> list[ShardJob]:
    jobs = []
    names = dict(enumerate(manifest.identities))
    converter = str(manifest.card.get("converter")) if report.published else ""
    for number, shard in enumerate(manifest.shards):
        rows = np.zeros(0, INDEX_DTYPE) if index is None else index[index["shard"] == number]
        pids = [names.get(pid, f"number {pid}, which {MANIFEST_NAME} does not list") for pid in rows["pid"].tolist()]
        foreign = bool(manifest.records_sha256)
        jobs.append(
            ShardJob(number, report.folder, shard, rows, pids, foreign, index is not None, converter, tokenizer)
        )
    return jobs


def _results(jobs: list[ShardJob], workers: int, what: str) -> list[ShardFindings]:
    """The findings of all tars, in their order."""
    total = sum(job.shard.samples for job in jobs)
    with tqdm(total=total, desc=what, unit=" samples", disable=None) as bar:

        def advance(samples: int) -> None:
            bar.update(samples)

        found = list(run_jobs(check_shard, jobs, min(workers, len(jobs)), advance))
    return sorted(found, key=lambda each: each.number)


def _check_counts(report: Report, manifest: Manifest, index: Index) -> None:
    for number, split in enumerate(SPLITS):
        rows = index["split"] == number
        if rows.any():
            report.splits[split] = _counts(index[rows])
    if len(set(manifest.identities)) != len(manifest.identities):
        report.add(MANIFEST_NAME, "lists an identity twice")
    listed = {
        str(split): Counts(each.identities, each.images, each.captions, each.cameras)
        for split, each in manifest.splits.items()
    }
    for name in dict.fromkeys([*listed, *report.splits]):
        if listed.get(name) != report.splits.get(name):
            stated, found = (_phrase(counts.get(name)) for counts in (listed, report.splits))
            report.add(MANIFEST_NAME, f"says {stated} in split {name}, the index holds {found}")


def _phrase(counts: Counts | None) -> str:
    if counts is None:
        return "nothing"
    return (
        f"{counts.identities} identities, {counts.images} images, {counts.captions} captions, {counts.cameras} cameras"
    )


def _counts(rows: Index) -> Counts:
    cameras = np.unique(rows["camid"])
    people = ~np.isin(rows["role"], _NOT_PEOPLE)
    return Counts(
        identities=len(np.unique(rows["pid"][people])),
        images=len(rows),
        captions=int(rows["captions"].sum()),
        cameras=int((cameras >= 0).sum()),
    )


def _by_shard(manifest: Manifest, index: Index) -> npt.NDArray[np.int64]:
    """Rows of the index in the order of the results: shard by shard. Shape: (N,)."""
    return _joined([np.flatnonzero(index["shard"] == number) for number in range(len(manifest.shards))])


def _check_keys(report: Report, manifest: Manifest, index: Index, results: list[ShardFindings]) -> None:
    """In a set of ours a key stands for one sample only; foreign tars may each count from zero."""
    if manifest.records_sha256 or not results:
        return
    keys = np.concatenate([found.keys for found in results])
    shards = index["shard"][_by_shard(manifest, index)]
    keys, shards = keys[keys != 0], shards[keys != 0]
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order][1:] == keys[order][:-1]]
    for number in np.unique(shards[again]).tolist():
        count = int((shards[again] == number).sum())
        report.add(f"shard {manifest.shards[number].name}", f"{count} of its keys occur a second time in the set")


def _count(report: Report, index: Index, results: list[ShardFindings]) -> None:
    """Duplicates, captions and parts."""
    assert report.manifest is not None
    entries = index[_by_shard(report.manifest, index)]
    digests, training = entries["image_digest"], (entries["split"] == SPLITS.index("train")).astype(np.int64)
    report.duplicates = {
        "copies": len(digests) - len(np.unique(digests)),
        "identities": int(shared_mask(digests, entries["pid"].astype(np.int64)).sum()),
        "splits": int(shared_mask(digests, training).sum()),
    }
    starts = np.cumsum([0, *(len(found.parts) for found in results)]).tolist()
    rows = _joined([np.asarray(found.caption_rows) + start for found, start in zip(results, starts, strict=False)])
    digest = _joined([np.asarray(found.caption_digests) for found in results]).astype(np.uint64)
    words = _joined([np.asarray(found.caption_words) for found in results])
    for number, split in enumerate(SPLITS):
        chosen = entries["split"][rows] == number
        if chosen.any():
            pids = entries["pid"][rows[chosen]].astype(np.int64)
            report.captions[split] = count_captions(digest[chosen], pids, words[chosen])
    if report.published:
        part = np.array([each for found in results for each in found.parts])
        report.parts = {name: _counts(entries[part == name]) for name in sorted(set(part.tolist()) - {""})}


def _joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _compare_published(report: Report, expect: bool) -> None:
    for part, published in report.published.items():
        found = report.parts.get(part, Counts(0, 0, 0, 0))
        pairs = zip(astuple(found), astuple(published), strict=True)
        if expect and not all(there is None or here == there for here, there in pairs):
            report.add("", f"{part}: {_phrase(found)}, other than published (see the table)")
