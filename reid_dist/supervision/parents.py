"""Ranks that do not outlive their launcher, and loader workers that do not outlive their rank.

A killed launcher tells its ranks nothing: they would train on, unseen, on devices that the next run wants.
"""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

from reid_dist.exit_codes import ExitCode
from reid_dist.supervision.leaving import FOLDER, end_now, say
from reid_dist.supervision.processes import Process, ancestors, signal_at_parents_end

_POLL_S = 0.5
# From the launcher's end to the rank's, at most: time to save where steps are short.
_ORPHAN_S = 4.0
_PROGRAMS = {"deepspeed", "torchrun", "accelerate", "supervise.py", "srun", "mpirun", "mpiexec", "orted", "prted"}
_MODULES = ("deepspeed.launcher", "torch.distributed.", "accelerate.commands", "slurmstepd")
# Only the launchers themselves set these, in their ranks: torchrun the first, deepspeed the second.
_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")

_called = False
_forked_by = 0


def die_with_parent() -> None:
    """Sends this rank SIGTERM when one of its launchers ends, and ends it four seconds later; call it first of all.

    Launchers are known by name, from the parent upwards: a shell that started the run may end, the run goes on. Child
    processes that are forked from now on are killed when this process ends. Only the first call does anything.
    """
    global _called
    if _called:
        return
    _called = True
    launchers = _launchers(ancestors())
    if launchers:
        signal_at_parents_end(signal.SIGTERM)
    _tie_children()
    if _is_orphan(launchers):
        say("its launcher ended before it began; ends")
        end_now(ExitCode.LOST_PEER)
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="parents", daemon=True).start()


def _launchers(chain: list[Process]) -> list[Process]:
    """The processes from the parent to the last launcher above it; wrappers between rank and launcher count."""
    named = [_is_launcher(process.command()) for process in chain]
    if True not in named:
        return []
    stop = named.index(True)
    while stop < len(chain) and named[stop]:
        stop += 1
    return chain[:stop]


def _is_launcher(command: list[str]) -> bool:
    words = command[:4]  # interpreter, its options, program or module
    return any(os.path.basename(word) in _PROGRAMS or word.startswith(_MODULES) for word in words)


def _is_orphan(launchers: list[Process]) -> bool:
    """Whether a launcher ended before this process looked; it then has another parent already."""
    if folder := os.environ.get(FOLDER):
        return not _is_below_the_supervisors(Path(folder))
    if launchers:
        return os.getppid() != launchers[0].pid
    chain = ancestors()
    # Marked, and no launcher above. It may have an unknown name, but it is a Python program.
    return any(mark in os.environ for mark in _MARKS) and not any(
        "python" in word for process in chain for word in process.command()[:2]
    )


def _is_below_the_supervisors(folder: Path) -> bool:
    """Whether the process that the supervisor started is this one or above it, as its file says."""
    for _ in range(20):
        try:
            started = int((folder / "launcher").read_text())
            return started in (os.getpid(), *(process.pid for process in ancestors()))
        except (OSError, ValueError):  # not written yet
            time.sleep(0.1)
    return False


def _watch(launchers: list[Process]) -> None:
    parent = os.getppid()
    while all(process.runs() for process in launchers):
        time.sleep(_POLL_S)
    if os.getppid() == parent == launchers[0].pid:  # else the kernel has sent it
        os.kill(os.getpid(), signal.SIGTERM)
    if (folder := os.environ.get(FOLDER)) and not launchers[-1].runs():  # the supervisor cannot remove it any more
        shutil.rmtree(folder, ignore_errors=True)
    time.sleep(_ORPHAN_S)
    say("its launcher has ended; ends too")
    end_now(ExitCode.LOST_PEER)


def _tie_children() -> None:
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    # The kernel watches the thread that forks. One that ends while its process lives must not take the child along.
    global _forked_by
    _forked_by = os.getpid() if threading.current_thread() is threading.main_thread() else 0


def _after_fork() -> None:
    if _forked_by:
        signal_at_parents_end(signal.SIGKILL)
        if os.getppid() != _forked_by:  # it ended in between
            os._exit(ExitCode.LOST_PEER)
