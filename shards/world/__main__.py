"""Command line of the procedural world: export trees, measure vocabulary coverage, compute the oracle ceiling."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reid_dist.errors import UserError
from shards.world.export import export, write_whole
from shards.world.oracle import ceilings
from shards.world.spec import LEVELS, ExportSpec, World
from shards.world.trees import EXPORTERS
from shards.world.vocabulary import coverage_of


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
    out.add_argument("--ids", type=int, required=True, help="training identities; pairs for img2dataset")
    out.add_argument("--seed", type=int, required=True, help="seed of the world")
    out.add_argument("--test-ids", type=int, default=200, help="test identities (default 200)")
    out.add_argument("--val-ids", type=int, default=0, help="validation identities (default 0)")
    out.add_argument("--images", type=int, default=8, help="pictures per identity (default 8)")
    out.add_argument("--level", choices=list(LEVELS), default="standard", help="named difficulty (default standard)")
    out.add_argument("--hardness", type=float, help="strength of camera effects, 0 to 2")
    out.add_argument("--siblings", type=int, help="members of a family besides its base, 0 to 15")
    out.add_argument("--coverage", type=float, help="probability that a visible attribute is named, 0 to 1")
    out.add_argument("--wrong", type=float, help="probability of a wrong colour word, 0 to 1")
    out.add_argument("--person-share", type=float, default=0.4, help="img2dataset: share of pedestrian pairs")
    out.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    oracle = commands.add_parser("oracle", help="expected metrics of a perfect reader of attributes")
    oracle.add_argument("cuhk", type=Path, help="CUHK-PEDES tree")
    oracle.add_argument("market", type=Path, help="Market-1501 tree")
    oracle.add_argument("--json", type=Path, help="write the result to this file as well")
    words = commands.add_parser("vocabulary", help="share of the words of tree B that tree A's captions use")
    words.add_argument("corpus", type=Path, help="tree A, for example the img2dataset export")
    words.add_argument("target", type=Path, help="tree B, for example the CUHK-PEDES export")
    return parser


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"--{name} {value:g}: must be between {low:g} and {high:g}")


def _spec(args: argparse.Namespace) -> ExportSpec:
    values = dict(LEVELS[args.level])
    values.update({name: getattr(args, name) for name in values if getattr(args, name) is not None})
    _check("hardness", values["hardness"], 0, 2)
    _check("siblings", values["siblings"], 0, 15)
    _check("coverage", values["coverage"], 0, 1)
    _check("wrong", values["wrong"], 0, 1)
    _check("ids", args.ids, 1, 1_000_000)
    _check("seed", args.seed, 0, 2**50)
    _check("test-ids", args.test_ids, 0, 1_000_000)
    _check("val-ids", args.val_ids, 0, 1_000_000)
    _check("images", args.images, 2, 99)
    _check("person-share", args.person_share, 0, 1)
    _check("workers", args.workers, 1, 1024)
    world = World(args.seed, values["hardness"], int(values["siblings"]), values["coverage"], values["wrong"])
    return ExportSpec(args.format, world, args.ids, args.test_ids, args.val_ids, args.images, args.person_share)


def _export(args: argparse.Namespace) -> None:
    export(_spec(args), args.out, args.workers)


def _oracle(args: argparse.Namespace) -> None:
    text = json.dumps(ceilings(args.cuhk, args.market), indent=2)
    if args.json is not None:
        write_whole(args.json, text + "\n")
    print(text)


def _vocabulary(args: argparse.Namespace) -> None:
    share, missing, size = coverage_of(args.corpus, args.target)
    print(f"{share:.1f} % of {size} words; missing: {' '.join(missing) or 'none'}")


_COMMANDS = {"export": _export, "oracle": _oracle, "vocabulary": _vocabulary}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status (2 for wrong input)."""
    try:
        args = _parser().parse_args(argv)
        _COMMANDS[args.command](args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
