"""One shard of a plan: its raw images read, cleaned and written. This is what a worker process does."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from reid_dist.data.sample import MANIFEST_NAME, Sample
from reid_dist.errors import UserError
from shards.workers import Progress
from shards.writing.jpeg import CleanImage, clean_image
from shards.writing.plan import Entry
from shards.writing.tar_shard import ShardPart, TarShard, write_part


@dataclass(frozen=True)
class Rules:
    """What holds for all shards of a set.

    Attributes:
        folder: the set.
        dataset: its name.
        excluded_images: hex sha256 of raw or stored images to leave out.
        skip_bad: samples that cannot be used are left out and listed, instead of being an error.
    """

    folder: Path
    dataset: str
    excluded_images: frozenset[str]
    skip_bad: bool


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: its file name and the samples in order."""

    rules: Rules
    name: str
    entries: Sequence[Entry]


# What becomes of an entry: an image and its record; the reason for which it is skipped; None: it is excluded.
_Outcome = tuple[CleanImage, Sample] | str | None


def write_shard(job: ShardJob, progress: Progress) -> ShardPart:
    """Write a shard and its part.

    Args:
        job: the shard.
        progress: called with the number of images done.

    Raises:
        UserError: an image cannot be used and is not to be skipped.
        OSError: the shard cannot be written.
    """
    encoded = excluded = 0
    skipped: list[str] = []
    shard = TarShard(job.rules.folder / job.name)
    try:
        for entry, outcome in _in_tar_order(job):
            if outcome is None:
                excluded += 1
            elif isinstance(outcome, str):
                skipped.append(outcome)
            else:
                image, sample = outcome
                try:
                    shard.add(entry.key, sample, image.data)
                    encoded += image.encoded
                except UserError as error:
                    skipped.append(_reason(entry, error, job.rules))
            progress(1)
        part = shard.finish(encoded=encoded, excluded=excluded, skipped=skipped)
    finally:
        shard.discard()
    try:
        write_part(job.rules.folder, part)
    except FileNotFoundError:
        # Another call has written the same shard, merged, and removed the parts.
        if not (job.rules.folder / MANIFEST_NAME).exists():
            raise
    return part


def _in_tar_order(job: ShardJob) -> Iterator[tuple[Entry, _Outcome]]:
    if not any(entry.raw.image.group for entry in job.entries):
        for entry in job.entries:
            yield entry, _outcome(entry, job.rules)
        return
    # Group by group, as a group is decoded as a whole; the images of one shard fit into memory.
    outcomes: dict[str, _Outcome] = {}
    for entry in sorted(job.entries, key=lambda entry: (entry.raw.image.group, entry.raw.source)):
        outcomes[entry.key] = _outcome(entry, job.rules)
    for entry in job.entries:
        yield entry, outcomes.pop(entry.key)


def _outcome(entry: Entry, rules: Rules) -> _Outcome:
    raw = entry.raw
    try:
        data = raw.image.read()
        if rules.excluded_images and _sha256(data) in rules.excluded_images:
            return None
        image = clean_image(data, raw.image.name)
        stored = _sha256(image.data)
        if stored in rules.excluded_images:
            return None
        return image, _record(entry, rules.dataset, image, stored)
    except UserError as error:
        return _reason(entry, error, rules)


def _reason(entry: Entry, error: UserError, rules: Rules) -> str:
    """Why a sample is skipped; raises the error when none may be.

    It names the place in the raw tree: the card must not depend on where that lies.
    """
    if not rules.skip_bad:
        raise error
    text = str(error).removeprefix(entry.raw.image.name).removeprefix(entry.raw.source)
    return f"{entry.raw.source}: {text.lstrip(': ')}"


def _record(entry: Entry, dataset: str, image: CleanImage, stored: str) -> Sample:
    raw = entry.raw
    try:
        return Sample(
            dataset=dataset,
            pid=entry.pid(dataset),
            camid=raw.camid,
            split=raw.split,
            role=raw.role,
            captions=list(raw.captions),
            source=raw.source,
            width=image.width,
            height=image.height,
            sha256=stored,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"{raw.image.name}: {problem['loc']}: {problem['msg']}; correct its entry") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
