"""Command line of the procedural world: export trees, measure vocabulary and speed, compute the oracle ceiling."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from reid_dist.data.sample import ATTRIBUTES_NAME
from reid_dist.errors import UserError
from shards.command import exit_code
from shards.world.attributes import write_attributes
from shards.world.camera import CAMERAS
from shards.world.captions import STYLES
from shards.world.export import export, write_whole
from shards.world.formats import EXPORTERS
from shards.world.identity import HELD_OUT_MOST
from shards.world.oracle import ceilings
from shards.world.spec import LEVELS, ExportSpec, World
from shards.world.speed import images_per_second
from shards.world.vocabulary import coverage_of

MAX_CAMERAS = 50
KNOBS = tuple(item.name for item in fields(World) if item.name != "seed")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m shards.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    out = commands.add_parser("export", help="write a raw data set")
    out.add_argument("format", choices=sorted(EXPORTERS), help="raw format")
    out.add_argument("--out", type=Path, required=True, help="folder of the tree")
    out.add_argument("--ids", type=int, default=200, help="training identities; pairs for pair sets (default 200)")
    out.add_argument("--test-ids", type=int, default=200, help="test identities (default 200)")
    out.add_argument("--val-ids", type=int, default=0, help="validation identities (default 0)")
    out.add_argument("--images", type=int, default=8, help="pictures per identity (default 8)")
    out.add_argument("--person-share", type=float, default=0.4, help="generic pairs: share of pedestrians (default .4)")
    out.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    _add_knobs(out)
    oracle = commands.add_parser("oracle", help="expected metrics of a perfect reader of attributes")
    oracle.add_argument("cuhk", type=Path, help="CUHK-PEDES tree")
    oracle.add_argument("market", type=Path, help="Market-1501 tree")
    oracle.add_argument("--json", type=Path, help="write the result to this file as well")
    facts = commands.add_parser("attributes", help="tell a shard set what its people look like, for reports of errors")
    facts.add_argument("raw", type=Path, help="tree that the set was made of")
    facts.add_argument("shards", type=Path, help="shard set")
    words = commands.add_parser("vocabulary", help="share of the words of tree B that tree A's captions use")
    words.add_argument("corpus", type=Path, help="tree A, for example the img2dataset export")
    words.add_argument("target", type=Path, help="tree B, for example the CUHK-PEDES export")
    speed = commands.add_parser("speed", help="pictures per second of one core: person, camera, JPEG, two captions")
    speed.add_argument("--images", type=int, default=2000, help="pictures to draw (default 2000)")
    _add_knobs(speed)
    return parser


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    """Add everything that decides a world."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default 0)")
    parser.add_argument("--level", choices=list(LEVELS), default="standard", help="named difficulty (default standard)")
    parser.add_argument("--hardness", type=float, help="strength of camera effects, 0 to 2")
    parser.add_argument("--siblings", type=int, help="members of a family besides its base, 0 to 15")
    parser.add_argument("--coverage", type=float, help="probability that a visible attribute is named, 0 to 1")
    parser.add_argument("--wrong", type=float, help="probability of a wrong colour word, 0 to 1")
    parser.add_argument("--instance", type=float, help="strength of what holds for single pictures, 0 to 1 (default 0)")
    parser.add_argument("--cameras", type=int, help=f"cameras (default {CAMERAS})")
    parser.add_argument("--unseen-cameras", type=int, help="cameras that see test people only, and all of these")
    parser.add_argument("--held-out", type=int, help="colours per upper garment that only test people wear, 0 to 5")
    parser.add_argument("--mismatched", type=float, help="share of training pictures captioned as somebody else")
    parser.add_argument("--posters", type=float, help="share of generic scenes with a poster of a person (default 0)")
    parser.add_argument("--style", choices=list(STYLES), help="sentence frames of the captions (default mixed)")
    parser.add_argument("--test-style", choices=list(STYLES), help="those of test people (default: as --style)")


def _check(name: str, value: float, low: float, high: float, why: str = "") -> None:
    if not low <= value <= high:
        raise UserError(f"--{name} {value:g}: must be between {low:g} and {high:g}{why}")


def _world(args: argparse.Namespace) -> World:
    values: dict[str, Any] = {"seed": args.seed, **LEVELS[args.level]}
    values.update((name, getattr(args, name)) for name in KNOBS if getattr(args, name) is not None)
    if "style" in values:
        values.setdefault("test_style", values["style"])
    world = World(**values)
    _check("seed", world.seed, 0, 2**50)
    _check("hardness", world.hardness, 0, 2)
    _check("siblings", world.siblings, 0, 15)
    _check("coverage", world.coverage, 0, 1)
    _check("wrong", world.wrong, 0, 1)
    _check("instance", world.instance, 0, 1)
    most = EXPORTERS[args.format].cameras if "format" in args else MAX_CAMERAS
    _check("cameras", world.cameras, 2, min(most, MAX_CAMERAS), f" for {args.format}" if "format" in args else "")
    if world.unseen_cameras:
        why = " (or 0): a test person needs two cameras, and training at least one"
        _check("unseen-cameras", world.unseen_cameras, 2, world.cameras - 1, why)
    _check("mismatched", world.mismatched, 0, 1)
    _check("posters", world.posters, 0, 1)
    _check("held-out", world.held_out, 0, HELD_OUT_MOST)
    return world


def _spec(args: argparse.Namespace) -> ExportSpec:
    _check("ids", args.ids, 1, 1_000_000)
    _check("test-ids", args.test_ids, 0, 1_000_000)
    _check("val-ids", args.val_ids, 0, 1_000_000)
    _check("images", args.images, 2, 99)
    _check("person-share", args.person_share, 0, 1)
    _check("workers", args.workers, 1, 1024)
    return ExportSpec(args.format, _world(args), args.ids, args.test_ids, args.val_ids, args.images, args.person_share)


def _export(args: argparse.Namespace) -> None:
    export(_spec(args), args.out, args.workers)


def _oracle(args: argparse.Namespace) -> None:
    text = json.dumps(ceilings(args.cuhk, args.market), indent=2)
    if args.json is not None:
        write_whole(args.json, text + "\n")
    print(text)


def _attributes(args: argparse.Namespace) -> None:
    count = write_attributes(args.raw, args.shards)
    print(f"{args.shards / ATTRIBUTES_NAME}: attributes of {count} people")


def _vocabulary(args: argparse.Namespace) -> None:
    found = coverage_of(args.corpus, args.target)
    missing = " ".join(f"{word} ({count})" for word, count in found.missing.items())
    print(
        f"{found.word_share:.1f} % of {found.words} words, {found.occurrence_share:.1f} % of {found.occurrences} "
        f"occurrences; least used: {found.rarest[0]} ({found.rarest[1]}); missing: {missing or 'none'}"
    )


def _speed(args: argparse.Namespace) -> None:
    _check("images", args.images, 1, 1_000_000)
    wall, cpu = images_per_second(_world(args), args.images)
    print(f"{wall:.0f} images/s of wall clock, {cpu:.0f} images/s of processor time, one core, {args.images} images")


_COMMANDS = {
    "export": _export, "oracle": _oracle, "attributes": _attributes, "vocabulary": _vocabulary, "speed": _speed,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 2 wrong input, 1 the disk or the system fails, 128 + a signal."""

    def command() -> int:
        args = _parser().parse_args(argv)
        _COMMANDS[args.command](args)
        return 0

    return exit_code(command, "; run the same command again", last=argv is None)


if __name__ == "__main__":
    sys.exit(main())
