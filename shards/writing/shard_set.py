"""A raw data set to a shard set: list, count, plan, write what is missing, merge.

Every step can be taken again after a crash; nothing that is half written is ever taken for whole.
"""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from reid_dist.data.exclude import NOTHING, Exclusions, read_exclusions
from reid_dist.data.sample import DATASET_PATTERN, MANIFEST_NAME, Manifest
from reid_dist.errors import UserError
from shards.progress import Progress
from shards.raw import Converter
from shards.workers import run_jobs
from shards.writing.build import (
    BUILD_NAME,
    WRITER_VERSION,
    Build,
    describe_missing,
    done_parts,
    find_build,
    finished,
    merge,
    start_build,
    tree_digest,
)
from shards.writing.convert import Rules, ShardJob, write_shard
from shards.writing.counts import make_card
from shards.writing.files import remove_leftovers
from shards.writing.plan import Order, Plan, plan_shards
from shards.writing.tar_shard import PARTIAL_NAME


@dataclass(frozen=True)
class WriteOptions:
    """How a raw data set becomes shards.

    Attributes:
        dataset: name of the data set in samples and identities; empty: the converter's.
        variant: one of the converter's; empty: its first.
        shard_bytes: size that a tar should not exceed.
        seed: of the order of samples.
        order: see `shards.writing.plan`.
        exclude: list of identities and images to leave out.
        max_bad_fraction: share of images that may be skipped because they cannot be used; 0: the first one stops.
        allow_mismatch: go on when the counts are not the published ones.
        workers: processes.
        part: number from 1, of how many: only every n-th shard is written.
    """

    dataset: str = ""
    variant: str = ""
    shard_bytes: int = 64_000_000
    seed: int = 0
    order: Order = "shuffled"
    exclude: Path | None = None
    max_bad_fraction: float = 0.0
    allow_mismatch: bool = False
    workers: int = 1
    part: tuple[int, int] = (1, 1)


def write_set(name: str, converter: Converter, root: Path, out: Path, options: WriteOptions) -> Manifest | None:
    """Write a raw data set as shards, continue what was interrupted, or keep what is there.

    Args:
        name: of the converter.
        converter: its module.
        root: the raw tree; only read.
        out: folder to make, or one that an earlier call with the same options began.
        options: see there.

    Returns:
        The manifest; None when shards of other parts are still missing.

    Raises:
        UserError: wrong option, tree, counts or image, or `out` holds something else.
        OSError: a full disk, missing rights, a worker that was killed.
    """
    options = _checked(options, name, converter, root, out)
    exclusions = read_exclusions(options.exclude) if options.exclude else NOTHING
    made_from: dict[str, str | int] = {
        "writer": WRITER_VERSION,
        "converter": name,
        "dataset": options.dataset,
        "variant": options.variant,
        "shard_bytes": options.shard_bytes,
        "seed": options.seed,
        "order": options.order,
        "exclude": _digest(exclusions) if options.exclude else "",
        "tree": tree_digest(root),
    }
    build = find_build(out, made_from)
    manifest = finished(out) if build else None
    if manifest is not None:
        print(f"{out}: up to date ({manifest.samples} samples)")
        return merge(out)
    listed = converter.samples(root, options.variant)
    samples = list(tqdm(listed, desc=f"{name}: reading names", unit=" images", disable=None))
    card = make_card(name, converter, options.variant, root, samples, options.allow_mismatch)
    plan = plan_shards(samples, options.dataset, exclusions, options.order, options.seed, options.shard_bytes)
    del samples
    names = [plan.name(shard) for shard in range(len(plan.shards))]
    if build is not None and build.names != names:
        raise UserError(f"{out}: was planned otherwise by another version of the program; remove it and write it again")
    if build is None:
        build = Build(made_from=made_from, samples=len(plan.entries), names=names, excluded=plan.excluded, card=card)
        start_build(out, build)
    rules = Rules(out, options.dataset, exclusions.images, options.max_bad_fraction > 0)
    _write_shards(plan, build, rules, options)
    return _finish(out, build, options)


def _write_shards(plan: Plan, build: Build, rules: Rules, options: WriteOptions) -> None:
    """Write those shards of this part that are not there."""
    part, parts = options.part
    done = {part.file.name: len(part.skipped) for part in done_parts(rules.folder, build.names)}
    mine = [shard for shard in range(len(plan.shards)) if shard % parts == part - 1]
    todo = [shard for shard in mine if plan.name(shard) not in done]
    if len(todo) < len(mine):
        print(f"{rules.folder}: continuing, {len(mine) - len(todo)} of {len(mine)} shards are there")
    bad = _BadImages(build.samples, options.max_bad_fraction, sum(done.values()))
    names = {plan.name(shard) for shard in todo}
    _remove_leftovers(rules.folder, names)
    jobs = (ShardJob(rules, plan.name(shard), plan.entries_of(shard)) for shard in todo)
    total = sum(len(plan.shards[shard]) for shard in todo)
    try:
        with (
            Progress(f"{plan.dataset}: writing", "images", total) as bar,
            closing(run_jobs(write_shard, jobs, min(options.workers, len(todo)), bar.add)) as results,
        ):
            for result in results:
                for reason in result.skipped:
                    bar.note(f"skipped: {reason}")
                bad.add(result.skipped)
    finally:
        # Of workers that were ended.
        _remove_leftovers(rules.folder, names)


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    remove_leftovers(folder, {*names, BUILD_NAME})
    remove_leftovers(folder / PARTIAL_NAME, {f"{name}.json" for name in names})


class _BadImages:
    """Counts images that cannot be used and stops above the bound."""

    def __init__(self, samples: int, bound: float, bad: int) -> None:
        self._samples, self._bound, self._bad = samples, bound, bad
        self._check("skipped by an earlier call")

    def add(self, skipped: Sequence[str]) -> None:
        self._bad += len(skipped)
        if skipped:
            self._check(f"the last one: {skipped[-1]}")

    def _check(self, which: str) -> None:
        if self._bad > self._bound * self._samples:
            raise UserError(
                f"{self._bad} of {self._samples} images cannot be used ({which}), more than --max-bad-fraction "
                f"{self._bound:g} allows; repair the raw data or raise the bound"
            )


def _finish(out: Path, build: Build, options: WriteOptions) -> Manifest | None:
    """Merge when every part is there."""
    there = {part.file.name for part in done_parts(out, build.names)}
    missing = set(build.names) - there
    # Another part may have merged meanwhile.
    if missing and finished(out) is None:
        part, parts = options.part
        print(f"{out}: part {part}/{parts} is written. {describe_missing(out, build, missing)}. The last one merges")
        return None
    manifest = merge(out)
    skipped = len(manifest.card["skipped"])
    print(
        f"{out}: {manifest.samples} samples in {len(manifest.shards)} shards"
        + (f"; {skipped} skipped, listed in {MANIFEST_NAME}" if skipped else "")
        + (f"; {manifest.card['excluded']} excluded" if manifest.card["excluded"] else "")
    )
    return manifest


def _checked(options: WriteOptions, name: str, converter: Converter, root: Path, out: Path) -> WriteOptions:
    """The options with their defaults filled in.

    Raises:
        UserError: one is wrong.
    """
    dataset, variant = options.dataset or name, options.variant or next(iter(converter.EXPECTED))
    part, parts = options.part
    if not DATASET_PATTERN.fullmatch(dataset):
        raise UserError(f"--dataset {dataset!r}: at most 64 of [A-Za-z0-9_-]")
    if variant not in converter.EXPECTED:
        raise UserError(f"--variant {variant}: {name} has {', '.join(converter.EXPECTED)}")
    if options.shard_bytes <= 0 or options.seed < 0:
        raise UserError("--shard-mb must be above 0 and --seed not below 0")
    if not 0 <= options.max_bad_fraction < 1:
        raise UserError(f"--max-bad-fraction {options.max_bad_fraction:g}: from 0 to below 1")
    if options.workers < 1 or not 1 <= part <= parts:
        raise UserError(f"--workers {options.workers} --part {part}/{parts}: at least 1 worker, and 1 <= i <= n")
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; it is the unpacked raw data set")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out}: lies inside --root {root}, which is only read; name a folder outside")
    return replace(options, dataset=dataset, variant=variant)


def _digest(exclusions: Exclusions) -> str:
    lines = "\n".join([*sorted(exclusions.pids), *sorted(exclusions.images)])
    return hashlib.sha256(lines.encode()).hexdigest()
