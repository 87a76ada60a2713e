"""Watches over a launcher: `python launch/supervise.py [--restarts N] [--grace S] -- deepspeed launch/train.py ...`.

SIGTERM, SIGINT and SIGUSR1 reach the ranks, nothing outlives the run, and its exit code is that of the ranks.
"""

import argparse
import shutil
import sys

from reid_dist.supervision.launcher import supervise


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what follows `--` is the launcher's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="after a lost rank or a hang, at most")
    parser.add_argument(
        "--grace", type=float, default=120, metavar="S", help="seconds from a signal to the end; more than a save takes"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command", help="deepspeed, torchrun or python")
    arguments = parser.parse_args(argv)
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    if not arguments.command or shutil.which(arguments.command[0]) is None:
        parser.error(f"no program to start: {' '.join(arguments.command[:1]) or 'name one after --'}")
    if arguments.restarts < 0 or not arguments.grace > 0:
        parser.error("--restarts must not be negative, --grace must be positive")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the ranks; 2 for a wrong command line."""
    arguments = parse_arguments(argv)
    return supervise(
        arguments.command,
        arguments.restarts,
        arguments.grace,
        lambda line: print(f"supervise.py: {line}", file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
