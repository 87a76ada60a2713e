"""Tars of image-text pairs made by others become a shard set: an index, a manifest and records beside or apart.

The tars stay where and as they are. Each is read once from beginning to end; an interrupted call continues.
"""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from reid_dist.data.remote import check_location, expand_ranges, is_remote, shown_location
from reid_dist.data.sample import DATASET_PATTERN, INDEX_NAME, MANIFEST_NAME, RECORDS_NAME, SPLITS, Manifest, Split
from reid_dist.errors import UserError
from shards.indexing.foreign import TarJob, index_tar
from shards.progress import Progress
from shards.workers import run_jobs
from shards.writing.build import BUILD_NAME
from shards.writing.files import Temporary, is_temporary, remove_leftovers
from shards.writing.merge import write_index
from shards.writing.tar_shard import PARTIAL_NAME, Rows, ShardPart, read_part

_CARD: dict[str, Any] = {
    "title": "image-text pairs in tars of other software",
    "licence": "that of each image; unknown here",
    "consent": "unknown here; images from the web show people who were not asked",
    "converter": "index",
}


@dataclass(frozen=True)
class BuildOptions:
    """How foreign tars become a set.

    Attributes:
        out: folder of the index; None: the folder of the tars.
        dataset: name of the set; empty: that of the folder of the tars.
        split: of all samples.
        max_bad_fraction: share of samples that may be skipped because they cannot be used; 0: the first one stops.
        workers: processes, each reads a tar.
    """

    out: Path | None = None
    dataset: str = ""
    split: Split = "train"
    max_bad_fraction: float = 0.0
    workers: int = 1


def build_index(sources: Sequence[str], options: BuildOptions) -> tuple[Path, Manifest]:
    """Index tars.

    Args:
        sources: folders of tars, tars, or URLs of tars (http, https, s3); `{00000..00012}` stands for numbers.
        options: see there.

    Returns:
        The folder and its manifest.

    Raises:
        UserError: wrong option; no or missing tars; a damaged or hostile tar; bad samples above the bound.
        OSError: a full disk, missing rights.
    """
    if not 0 <= options.max_bad_fraction < 1 or options.workers < 1:
        raise UserError("--max-bad-fraction is from 0 to below 1, --workers at least 1")
    locations = _tars(sources)
    folder = _folder(locations, options.out)
    options = replace(options, dataset=_dataset(locations[0], options.dataset))
    jobs = _jobs(locations, folder, options)
    _refuse_foreign(folder)
    (folder / PARTIAL_NAME).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    remove_leftovers(folder / PARTIAL_NAME)
    _index_tars(jobs, options.workers)
    return folder, _merge(folder, jobs, options)


def _index_tars(jobs: Sequence[TarJob], workers: int) -> None:
    todo = [job for job in jobs if _done(job) is None]
    # Until the end nothing here is a set: an older index may not fit the tars any more.
    if todo:
        (jobs[0].folder / MANIFEST_NAME).unlink(missing_ok=True)
    try:
        with (
            Progress("indexing", "tars", len(todo)) as bar,
            closing(run_jobs(index_tar, todo, min(workers, len(todo)), _nothing)) as parts,
        ):
            for part in parts:
                for reason in part.skipped:
                    bar.note(f"skipped: {reason}")
                bar.add(1)
    finally:
        remove_leftovers(jobs[0].folder / PARTIAL_NAME)


def _nothing(units: int) -> None:
    """Tars are counted, not samples: how many they hold is not known before."""


def _done(job: TarJob) -> ShardPart | None:
    """The part that an interrupted call left of a tar; None when there is none or the tar has changed since."""
    part = read_part(job.folder, job.name)
    if part is None or not job.records.is_file() or part.file.location != ("" if job.inside else job.location):
        return None
    if part.skipped and not job.skip_bad:
        return None
    if not is_remote(job.location):
        state = Path(job.location).stat()
        if state.st_size != part.file.bytes or state.st_mtime_ns > job.records.stat().st_mtime_ns:
            return None
    same_set = all(pid.startswith(f"{job.dataset}:") for pid in part.identities[:1])
    same_split = bool((part.index["split"] == SPLITS.index(job.split)).all())
    return part if same_set and same_split else None


def _merge(folder: Path, jobs: Sequence[TarJob], options: BuildOptions) -> Manifest:
    card = {**_CARD, "split": options.split, **_totals(jobs, options.max_bad_fraction)}
    records = Temporary(folder / RECORDS_NAME)
    digest = hashlib.sha256()
    try:
        starts = []
        for job in jobs:
            starts.append(records.file.tell())
            with job.records.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    records.file.write(block)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        records.commit()
    finally:
        records.discard()
    parts = (_moved(_part(job), start) for job, start in zip(jobs, starts, strict=True))
    manifest = write_index(folder, options.dataset, parts, card, digest.hexdigest())
    shutil.rmtree(folder / PARTIAL_NAME, ignore_errors=True)
    return manifest


def _totals(jobs: Sequence[TarJob], bound: float) -> dict[str, Any]:
    """What the card tells of all tars.

    Raises:
        UserError: more bad samples than allowed, or no good one.
    """
    samples = failed = 0
    skipped: list[str] = []
    ignored: Counter[str] = Counter()
    for job in jobs:
        part = _part(job)
        samples += part.file.samples
        failed += part.failed
        skipped += part.skipped
        ignored.update(part.ignored)
    if len(skipped) > bound * (samples + len(skipped)):
        raise UserError(
            f"{len(skipped)} of {samples + len(skipped)} samples cannot be used, more than --max-bad-fraction "
            f"{bound:g} allows (the last one: {skipped[-1]}); repair the tars or raise the bound"
        )
    if not samples:
        raise UserError(f"{jobs[0].folder}: no samples in {len(jobs)} tars; they need .jpg and .txt or .json members")
    if ignored:
        listed = ", ".join(f"{count} .{kind}" for kind, count in sorted(ignored.items()))
        print(f"members that are not read: {listed}")
    return {"skipped": skipped, "failed_rows": failed, "ignored_members": dict(sorted(ignored.items()))}


def _part(job: TarJob) -> ShardPart:
    part = read_part(job.folder, job.name)
    if part is None:
        raise OSError(f"{job.folder / PARTIAL_NAME}: changed while it was read; run the same command again")
    return part


def _moved(part: ShardPart, start: int) -> ShardPart:
    """A part whose records begin at another place of the file of records."""
    index: Rows = part.index
    index["json_offset"] += start
    return part.with_index(index)


def _jobs(locations: Sequence[str], folder: Path, options: BuildOptions) -> list[TarJob]:
    jobs: dict[str, TarJob] = {}
    for location in locations:
        name = _base_name(location)
        if name in jobs:
            raise UserError(
                f"{shown_location(location)}: a second tar named {name} (after {shown_location(jobs[name].location)}); "
                f"index each folder as a set of its own"
            )
        jobs[name] = TarJob(
            name=name,
            location=location,
            inside=not is_remote(location) and Path(location).parent == folder,
            folder=folder,
            dataset=options.dataset,
            split=options.split,
            skip_bad=options.max_bad_fraction > 0,
        )
    return list(jobs.values())


def _tars(sources: Sequence[str]) -> list[str]:
    """The tars that the sources stand for: absolute paths and URLs.

    Raises:
        UserError: another scheme, no tars, a tar that is not there.
    """
    found = [tar for source in sources for tar in _tars_of(source)]
    missing = [tar for tar in found if not is_remote(tar) and not Path(tar).is_file()]
    if missing:
        more = ", …" if len(missing) > 3 else ""
        raise UserError(
            f"{', '.join(missing[:3])}{more}: no such tar ({len(missing)} in all); correct the name, or leave the "
            f"number out of the braces"
        )
    for tar in found:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,150}\.tar", _base_name(tar)):
            raise UserError(f"{shown_location(tar)}: a tar's name is up to 150 of [A-Za-z0-9_.-] and .tar; rename it")
    return found


def _tars_of(source: str) -> Iterator[str]:
    location = check_location(source)
    shown = shown_location(location)
    if not is_remote(location) and Path(location).is_dir():
        tars = sorted(path for path in Path(location).resolve().iterdir() if path.suffix == ".tar")
        if not tars:
            raise UserError(f"{shown}: holds no .tar; name the folder of the tars")
        yield from map(str, tars)
        return
    if not _base_name(location).endswith(".tar"):
        remote = ", as the files behind a URL cannot be listed" if is_remote(location) else ""
        raise UserError(f"{shown}: no folder and no .tar; name tars like {{00000..00012}}.tar{remote}")
    for name in expand_ranges(location):
        yield name if is_remote(name) else str(Path(name).resolve())


def _base_name(location: str) -> str:
    path = urlsplit(location).path if is_remote(location) else location
    return path.rpartition("/")[2]


def _folder(locations: Sequence[str], out: Path | None) -> Path:
    """The folder of the set, which must not be one of `python -m shards.write`."""
    if out is None:
        parents = {Path(tar).parent for tar in locations if not is_remote(tar)}
        if len(parents) != 1 or any(map(is_remote, locations)):
            raise UserError("--out: name the folder of the index, as the tars do not lie in one local folder")
        out = parents.pop()
    folder = out.resolve()
    if (folder / BUILD_NAME).exists():
        raise UserError(f"{folder}: is a set of python -m shards.write, which has its index; choose another --out")
    if (folder / INDEX_NAME).exists() and not (folder / RECORDS_NAME).exists():
        raise UserError(f"{folder}: holds a shard set with another index; choose another --out")
    return folder


def _refuse_foreign(folder: Path) -> None:
    """Refuse to write over, or to remove, files that another program has left beside the tars.

    Raises:
        UserError: there are such.
    """
    manifest, partial = folder / MANIFEST_NAME, folder / PARTIAL_NAME
    remedy = "choose another --out, or remove it if nobody needs it"
    if manifest.exists() and not _is_ours(manifest):
        raise UserError(f"{manifest}: is not of python -m shards.index; {remedy}")
    begun = partial.is_dir() and all(map(_is_of_a_part, partial.iterdir()))
    if partial.exists() and not begun:
        raise UserError(f"{partial}: holds what is not of python -m shards.index; {remedy}")
    # An interrupted call leaves both; the manifest comes last.
    if (folder / RECORDS_NAME).exists() and not begun and not manifest.exists():
        raise UserError(f"{folder / RECORDS_NAME}: is not of python -m shards.index; {remedy}")


def _is_ours(manifest: Path) -> bool:
    try:
        return bool(Manifest.model_validate_json(manifest.read_bytes()).records_sha256)
    except (OSError, ValidationError):
        return False


def _is_of_a_part(path: Path) -> bool:
    return path.is_file() and (is_temporary(path) or path.name.endswith((".tar.json", ".tar.jsonl")))


def _dataset(location: str, dataset: str) -> str:
    if dataset:
        if not DATASET_PATTERN.fullmatch(dataset):
            raise UserError(f"--dataset {dataset!r}: at most 64 of [A-Za-z0-9_-]")
        return dataset
    path = urlsplit(location).path if is_remote(location) else location
    parent = path.rstrip("/").split("/")[-2:-1] or [""]
    return re.sub(r"[^A-Za-z0-9_-]", "_", parent[0])[:64] or "pairs"
