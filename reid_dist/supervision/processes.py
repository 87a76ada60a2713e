"""Processes of this machine as Linux tells of them in /proc."""

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
# Looked up now: a child calls it right after a fork, when little else is safe.
_prctl = ctypes.CDLL(None, use_errno=True).prctl


@dataclass(frozen=True)
class Process:
    """A process; `began` tells it from a later one with the same id.

    Attributes:
        pid: its id.
        began: clock ticks from the start of the machine to its own.
        parent: its parent's id when it was looked at.
    """

    pid: int
    began: int
    parent: int

    def runs(self) -> bool:
        """Whether it has not ended; one that has ended and is not reaped yet does not run."""
        return find(self.pid, self.began) is not None

    def signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        if self.runs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def command(self) -> list[str]:
        """Its command line; empty when it may not be read or the process has ended."""
        try:
            return _PROC.joinpath(str(self.pid), "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return []


def find(pid: int, began: int | None = None) -> Process | None:
    """The running process of this id, which began then; None when there is none."""
    try:
        text = _PROC.joinpath(str(pid), "stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent, *rest = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    found = Process(pid, int(rest[17]), int(parent))
    return None if state in "ZX" or began not in (None, found.began) else found


def ancestors() -> list[Process]:
    """The processes above this one, its parent first, as far as they can be seen."""
    found, pid = [], os.getppid()
    while pid > 0 and (process := find(pid)) is not None:
        found.append(process)
        pid = process.parent
    return found


def descendants() -> list[Process]:
    """The running processes below this one, parents before their children."""
    children: dict[int, list[Process]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (process := find(int(entry.name))) is not None:
            children.setdefault(process.parent, []).append(process)
    found = children.get(os.getpid(), [])
    for process in found:  # grows meanwhile
        found.extend(children.get(process.pid, []))
    return found


def signal_at_parents_end(number: int) -> None:
    """Lets the kernel send this process a signal when the thread that made it ends."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, number, 0, 0, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parents end."""
    _prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
