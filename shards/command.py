"""How the programs of `shards/` end: one line on standard error and an exit code."""

import sys
from collections.abc import Callable

from reid_dist.errors import UserError
from shards.workers import Interrupted, signals_raise


def exit_code(command: Callable[[], int], interrupted: str, last: bool) -> int:
    """Run a program's work, with signals as exceptions, and return its exit code.

    Args:
        command: returns the exit code of a run that went its way.
        interrupted: what a user who has stopped it is to know.
        last: the process ends with this code, whatever signal comes on the way out.

    Returns:
        The command's own code; 2 for wrong input, 1 for a full disk, missing rights and the like, 128 + a signal.
    """
    try:
        with signals_raise(last):
            return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as signal:
        print(f"error: interrupted{interrupted}", file=sys.stderr)
        return 128 + signal.number
