"""Measures a part: `python launch/benchmark.py PART --json OUT ...`; without a part, or with -h, it names them."""

import argparse
import sys

from reid_dist.benchmarks import checkpoint, classifier, data, evaluation, kernel, plan, queue, search, step
from reid_dist.errors import UserError

BENCHMARKS = {
    "data": data,
    "kernel": kernel,
    "queue": queue,
    "classifier": classifier,
    "evaluation": evaluation,
    "search": search,
    "step": step,
    "plan": plan,
    "checkpoint": checkpoint,
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for wrong input, 1 for a full disk and the like."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        help_text = (benchmark.__doc__ or "").splitlines()[0]
        benchmark.add_arguments(commands.add_parser(name, help=help_text, description=benchmark.__doc__))
    arguments = parser.parse_args(argv)
    try:
        BENCHMARKS[arguments.benchmark].run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
