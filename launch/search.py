"""Searches one's own photographs of people: index them, query the index, delete from it, calibrate it, serve it.

python launch/search.py index RUN photos/ --out photos.index
python launch/search.py query photos.index --text "a woman in a red coat with a black backpack"
"""

import argparse
import os
import sys

from reid_dist.errors import UserError
from reid_dist.search import commands, serve

COMMANDS = {
    "index": (commands.add_index_arguments, commands.run_index),
    "query": (commands.add_query_arguments, commands.run_query),
    "delete": (commands.add_delete_arguments, commands.run_delete),
    "calibrate": (commands.add_calibrate_arguments, commands.run_calibrate),
    "serve": (serve.add_arguments, serve.run),
}
_SUMMARY = {
    "index": "makes an index of photographs, or adds to it what is new",
    "query": "finds photographs by a sentence, a picture or both",
    "delete": "deletes photographs from an index, with their vectors and codes",
    "calibrate": "measures below which score a hit is of somebody unknown",
    "serve": "shows a web page to search with",
}
_INTERRUPTED = {
    "index": "; the index is whole, and the same command goes on with what was encoded",
    "delete": "; the index is whole, and the same command deletes what is left to delete",
    "calibrate": "; the index is whole, and the same command measures its thresholds anew",
}


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, _) in COMMANDS.items():
        add_arguments(parsers.add_parser(name, help=_SUMMARY[name], description=f"{name}: {_SUMMARY[name]}."))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after one clear line for wrong input; 1 for a full disk and the like."""
    arguments = command_parser().parse_args(argv)
    try:
        COMMANDS[arguments.command][1](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on; without this, closing fails again
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: interrupted{_INTERRUPTED.get(arguments.command, '')}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
