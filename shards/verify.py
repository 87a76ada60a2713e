"""`python -m shards.verify DIR...`: is every byte of a shard set what its manifest says, and does every sample read?

`python -m shards.verify --overlap DIR... --out exclude.txt` looks for test images inside training splits instead, see
`shards.checking.overlap`.

Exit code 0: whole, or nothing shared. 1: damage or overlap, a full disk. 2: wrong usage. 128 + n: ended by signal n.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from reid_dist.data.reader import ShardSet
from reid_dist.data.remote import check_location, is_remote, shown_location
from reid_dist.errors import UserError
from shards.checking.captions import TokenizerChoice, make_tokenizer
from shards.checking.overlap import find_overlaps, prepare_list, table, unrecognised, write_exclusions
from shards.checking.shard_set import Report, verify_set
from shards.command import exit_code
from shards.raw import Counts
from shards.workers import processors
from shards.writing.files import write_file

_LISTED = 20
_COLUMNS = ("identities", "images", "captions", "cameras")


def print_report(report: Report) -> None:
    """A report for people: counts, duplicates, captions and at most 20 lines of damage."""
    manifest = report.manifest
    name = manifest.dataset if manifest else "?"
    print(f"{report.folder} ({name})")
    if manifest is not None:
        megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
        print(f"  {manifest.samples:,} samples in {len(manifest.shards):,} shards, {megabytes:,.1f} MB")
    for line in _count_lines(report):
        print(f"  {line}")
    for line in (*_duplicate_lines(report), *_caption_lines(report)):
        print(f"  {line}")
    if report.beside:
        print(f"  members beside the indexed images: {report.beside:,}")
    for damage in report.damage[:_LISTED]:
        print(f"  DAMAGE {damage_line(report, damage.place, damage.what)}")
    if len(report.damage) > _LISTED:
        print(f"  ... and {len(report.damage) - _LISTED} more; --json FILE holds all of them")
    print("  " + (f"{len(report.damage)} damages" if report.damage else "whole: every hash, count and sample is right"))


def damage_line(report: Report, place: str, what: str) -> str:
    """One damage with its place and the remedy."""
    where = f"{report.folder}, {place}" if place else str(report.folder)
    return f"{where}: {what}; {report.remedy}"


def as_json(report: Report) -> dict[str, Any]:
    """The whole report in plain types."""
    manifest = report.manifest
    return {
        "set": str(report.folder),
        "dataset": manifest.dataset if manifest else None,
        "samples": manifest.samples if manifest else None,
        "shards": len(manifest.shards) if manifest else None,
        "whole": not report.damage,
        "damage": [{"place": each.place, "what": each.what, "remedy": report.remedy} for each in report.damage],
        "splits": {name: asdict(counts) for name, counts in report.splits.items()},
        "parts": {name: asdict(counts) for name, counts in report.parts.items()},
        "published": {name: asdict(counts) for name, counts in report.published.items()},
        "duplicates": report.duplicates,
        "captions": {name: counts._asdict() for name, counts in report.captions.items()},
        "cut_captions": report.cut,
        "beside": report.beside,
    }


def _count_lines(report: Report) -> list[str]:
    """Found counts, those of the published parts beside what is published."""
    if not report.published:
        rows = [(name, [f"{number:,}" for number in astuple(counts)]) for name, counts in report.splits.items()]
        note = "" if report.manifest is None or not rows else "   (no published counts)"
    else:
        rows = []
        for name in dict.fromkeys([*report.published, *report.parts]):
            found, published = report.parts.get(name, Counts(0, 0, 0, 0)), report.published.get(name, Counts())
            pairs = zip(astuple(found), astuple(published), strict=True)
            rows.append((name, [f"{here:,} / " + ("-" if there is None else f"{there:,}") for here, there in pairs]))
        note = "   (found / published)"
    if not rows:
        return []
    head = f"{'':10}" + "".join(f"{column:>22}" for column in _COLUMNS) + note
    return [head, *(f"{name:10}" + "".join(f"{cell:>22}" for cell in cells) for name, cells in rows)]


def _duplicate_lines(report: Report) -> list[str]:
    found = report.duplicates
    if not found:
        return []
    return [
        f"duplicate images: {found['copies']:,} copies beyond the first; {found['identities']:,} images stand under "
        f"several identities, {found['splits']:,} in the training and another split"
    ]


def _caption_lines(report: Report) -> list[str]:
    lines = []
    for split, counts in report.captions.items():
        ceiling = f", a ceiling of {counts.ceiling:.2%} on R@1" if split != "train" and counts.shared else ""
        lines.append(
            f"captions of {split}: {counts.captions:,}, {counts.distinct:,} distinct, {counts.shared:,} shared by "
            f"several identities{ceiling}; {counts.words_least} to {counts.words_most} words, "
            f"mean {counts.words_mean:.1f}"
        )
    total = sum(counts.captions for counts in report.captions.values())
    if report.cut is not None and total:
        lines.append(f"captions that the tokenizer cuts: {report.cut:,} of {total:,} ({report.cut / total:.2%})")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shards.verify",
        description="Check shard sets for damage (exit code 1), or with --overlap for test images in training splits.",
    )
    parser.add_argument("sets", nargs="+", metavar="DIR", help="shard folders; with --overlap also URLs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    check = parser.add_argument_group("checking")
    check.add_argument("--expect", action="store_true", help="other counts than the published ones are damage")
    parser.add_argument("--workers", type=int, help="processes (default: all processors, for a small set fewer)")
    check.add_argument("--vocabulary", default="", metavar="FILE", help="count captions that this word list's cut hits")
    check.add_argument(
        "--tokenizer", default="", metavar="NAME", help="... or this open_clip architecture's (ViT-B-16)"
    )
    check.add_argument("--context-length", type=int, default=77, help="tokens with start and end")
    overlap = parser.add_argument_group("overlap")
    overlap.add_argument("--overlap", action="store_true", help="compare every training with every val and test split")
    overlap.add_argument("--out", type=Path, metavar="FILE", help="write the shared identities for data.exclude")
    return parser


def _folder(text: str) -> Path:
    location = check_location(text)
    if is_remote(location):
        raise UserError(
            f"{shown_location(location)}: every byte is read; verify the set where it lies, or a copy of it"
        )
    return Path(location)


def _check(options: argparse.Namespace) -> int:
    if options.context_length < 3:
        raise UserError("--context-length must be at least 3: start, a word and end")
    if options.vocabulary and options.tokenizer:
        raise UserError("--vocabulary and --tokenizer: name one of them")
    choice = TokenizerChoice(options.vocabulary, options.tokenizer or "ViT-B-16", options.context_length)
    if options.vocabulary or options.tokenizer:
        make_tokenizer(choice)  # a wrong name is told before the long work; the default is made when it is needed
    reports = []
    for folder in options.sets:
        report = verify_set(_folder(folder), choice, options.expect, options.workers)
        print_report(report)
        reports.append(report)
    if options.json is not None:
        _write_json(options.json, {"sets": [as_json(report) for report in reports]})
    return int(any(report.damage for report in reports))


def _overlap(options: argparse.Namespace, command: str) -> int:
    if options.expect or options.vocabulary or options.tokenizer:
        raise UserError("--expect, --vocabulary and --tokenizer do not go with --overlap; check the sets first")
    if options.out is not None:
        prepare_list(options.out)
    # Opened before the long work: what is compared is named, not what lies there afterwards.
    compared = [ShardSet(each) for each in dict.fromkeys(options.sets)] if options.out is not None else []
    overlaps = find_overlaps(options.sets, options.workers or processors())
    pids = {pid for each in overlaps for pid in each.pids}
    lines = [*table(overlaps), f"identities excluded in all: {len(pids)}"]
    if options.out is not None:
        write_exclusions(options.out, pids, compared, [command, *lines])
        lines.append(f"{options.out}: written; name it as data.exclude")
    elif pids:
        lines.append("to leave these out of training, write a list: --out exclude.txt")
    hidden = unrecognised(overlaps)
    lines += [
        f"warning: {each.train} and {each.evaluation} both show people of {', '.join(each.origins)}, yet no image, "
        f"pixels or name is the same: copies were compressed anew and renamed; do not mix the sets"
        for each in hidden
    ]
    if options.json is not None:
        _write_json(options.json, {"overlaps": [{**asdict(each), "pids": sorted(each.pids)} for each in overlaps]})
    print("\n".join(lines))
    return int(bool(pids or hidden))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, see above."""
    options = _parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments

    def command() -> int:
        if options.workers is not None and options.workers < 1:
            raise UserError("--workers must be at least 1")
        if options.json is not None and options.json.is_dir():
            raise UserError(f"--json {options.json}: is a folder; name a file, such as {options.json / 'a.json'}")
        if options.overlap:
            # The list is handed on: without the secrets of URLs.
            return _overlap(options, f"python -m shards.verify {shlex.join(map(shown_location, given))}")
        if options.out is not None:
            raise UserError("--out: belongs to --overlap; the report is written with --json FILE")
        return _check(options)

    return exit_code(command, "", last=arguments is None)


if __name__ == "__main__":
    sys.exit(main())
