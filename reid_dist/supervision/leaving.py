"""How a rank tells its supervisor that it is there and how it ended: launchers pass on neither reliably.

`torchrun` ends with 1 whatever its ranks said, `deepspeed` with the code of the one it happened to see first.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from reid_dist.exit_codes import ExitCode
from reid_dist.supervision import processes

# The supervisor's folder for a start; without it there is nobody to tell.
FOLDER = "REID_DIST_SUPERVISION"


@dataclass(frozen=True)
class Rank:
    """A rank's entry in the folder.

    Attributes:
        pid: its process.
        began: see `processes.Process`.
        rank: global rank.
        local_rank: rank on this machine.
        port: where the ranks meet; DeepSpeed's files in /dev/shm have it in their names.
    """

    pid: int
    began: int
    rank: int
    local_rank: int
    port: int


def supervised(main: Callable[[], int]) -> int:
    """Runs a rank's `main` and returns its exit code, which the supervisor learns too, if there is one."""
    _enter()
    code: int = ExitCode.FAULT
    try:
        code = main()
    except SystemExit as left:  # argparse's
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    finally:
        record(code)
    return code


def leave(main: Callable[[], int]) -> NoReturn:
    """Ends this process as a rank's `main` says, see `supervised`.

    Where that is a failure or a stop, at once: an interpreter that finishes in good order waits for threads that wait
    for ranks that have gone, or crashes while one writes a checkpoint.
    """
    try:
        code = supervised(main)
    except Exception:
        traceback.print_exc()
        code = ExitCode.FAULT
    if code == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_now(code: int) -> NoReturn:
    """Ends this process at once, from any thread: nothing is finished, flushed or waited for."""
    try:
        record(code)
        remove_own_shared_memory()
    finally:
        os._exit(code)


def record(code: int) -> None:
    """Tells the supervisor how this rank ends; what is told first counts."""
    if folder := os.environ.get(FOLDER):
        # Told already, or the supervisor has gone and nobody asks any more.
        with contextlib.suppress(OSError), Path(folder, f"{os.getpid()}.code").open("x") as file:
            file.write(str(int(code)))


def say(line: str) -> None:
    """One line on stderr, from any thread, whatever the main thread holds."""
    os.write(2, f"rank {os.environ.get('RANK', '0')}: {line}\n".encode())


def remove_own_shared_memory() -> None:
    """See `remove_shared_memory`; for this rank."""
    remove_shared_memory(os.environ.get("MASTER_PORT", ""), os.environ.get("LOCAL_RANK", ""))


def remove_shared_memory(port: str | int, local_rank: str | int) -> None:
    """Removes the 66 MB file that DeepSpeed's CPU collectives leave in /dev/shm for a rank."""
    own = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{local_rank}"
    for file in Path("/dev/shm").glob(own):  # noqa: S108 (where DeepSpeed puts them)
        file.unlink(missing_ok=True)


def _enter() -> None:
    folder, here = os.environ.get(FOLDER), processes.find(os.getpid())
    if not folder or here is None:
        return
    rank, local_rank, port = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    entry = Path(folder, f"{here.pid}.rank")
    try:
        entry.with_suffix(".partial").write_text(json.dumps(asdict(Rank(here.pid, here.began, rank, local_rank, port))))
        entry.with_suffix(".partial").rename(entry)
    except OSError:  # a supervisor that was killed took its folder along; `parents` ends this rank
        pass
