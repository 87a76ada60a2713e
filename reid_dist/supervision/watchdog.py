"""Ends a run that stands still, with the stacks of all threads and the names of the ranks that the others wait for.

A process group's own timeout names nobody, does not see a loader that hangs, and lets the launcher find a code of its
own. Each rank judges by itself, by a clock that no other machine can stop; the others' heartbeats only tell the name.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from reid_dist import distributed
from reid_dist.exit_codes import ExitCode
from reid_dist.supervision.heartbeats import Doing, Heartbeats, Position
from reid_dist.supervision.leaving import end_now, say

_TICK_S = 0.5
# Others are read for so long, at least, before half of `hang_s` is over: who stays silent must be seen to.
_LOOK_S = 3.0
# A process that was stopped as a whole, as schedulers do, must not take the time for its own: more is not counted.
_MOST_OF_A_TICK_S = 1.5
# From the first rank's alarm to its end, so that the others can write their stacks; rank 0 keeps the heartbeats.
_LAST_WORDS_S = 1.2
_RANK_0_LATER_S = 0.5
# Modules in whose functions a rank waits for others.
_COLLECTIVES = ("torch.distributed.", "reid_dist.distributed", "reid_dist.supervision.agreement")
_REPORT_S = 3.5  # at most, whatever blocks: a full pipe, a file system that hangs


class Watchdog:
    """Ends every rank with 71, at most five seconds after one has made no progress for `hang_s`; a context manager.

    Collective to make, once the process group exists; left before the group is.

    Args:
        hang_s: without progress, at most; the first step and a save are in it too.
        folder: gets rank-N.txt with the stacks of rank N.
    """

    def __init__(self, hang_s: float, folder: Path) -> None:
        self._hang_s = hang_s
        self._folder = folder
        self._rank, self._ranks = distributed.rank(), distributed.world_size()
        self._position = Position(0, 0, 0, "start")
        self._paused = False
        self._idle_s = 0.0
        self._left = threading.Event()
        self._heartbeats = Heartbeats()

    def __enter__(self) -> "Watchdog":
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._publish)]
        self._arm()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for thread in self._threads:  # one that wakes while the interpreter ends would abort it
            thread.join(2 * _TICK_S)
        faulthandler.cancel_dump_traceback_later()

    def at(self, phase: str, step: int) -> None:
        """Progress: this rank begins a phase of a step. Costs no system call; the same calls on every rank."""
        last = self._position
        self._position = Position(
            last.stage + (step < last.step), step, last.count + 1 if step == last.step else 0, phase
        )

    @contextlib.contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """Watches nothing inside, nor ranks that wait for this one: what takes long and has no steps, an evaluation."""
        self.at(phase, self._position.step)
        self._paused = True
        try:
            yield
        finally:
            self.at(phase, self._position.step)
            self._paused = False

    def _watch(self) -> None:
        """Judges by the clock alone: what waits for another rank is `_publish`."""
        seen, before = self._position, time.monotonic()
        while not self._left.wait(_TICK_S):
            now = time.monotonic()
            moved = self._paused or self._position is not seen
            self._idle_s = 0.0 if moved else self._idle_s + min(now - before, _MOST_OF_A_TICK_S)
            seen, before = self._position, now
            self._arm()
            if self._idle_s >= self._hang_s and not self._heartbeats.excused():
                self._end(first=True)
            elif self._heartbeats.alarmed:
                self._end(first=False)

    def _arm(self) -> None:
        """Has the interpreter end the process where its main thread lets no other run, `_watch` among them."""
        faulthandler.dump_traceback_later(self._hang_s + _REPORT_S, exit=True, file=2)

    def _publish(self) -> None:
        """Tells the others where this rank is, and reads where they are; hangs where rank 0 has stopped."""
        while not self._left.is_set():
            suspicious = self._idle_s > max(0.0, self._hang_s / 2 - _LOOK_S)
            if not self._heartbeats.exchange(self._position, self._doing(), suspicious):
                return
            self._left.wait(_TICK_S)

    def _doing(self) -> Doing:
        if self._paused:
            return Doing.PAUSE
        return Doing.WAITING if self._idle_s > 0 and _is_in_a_collective() else Doing.WORK

    def _end(self, first: bool) -> None:
        threading.Thread(target=_exit_after, args=(_REPORT_S,), name="watchdog_end", daemon=True).start()
        if first:
            speaks = self._heartbeats.alarm()
            if speaks:
                say(self._line())
        _dump_stacks(self._folder / f"rank-{self._rank}.txt")
        time.sleep((_LAST_WORDS_S if first else 0.1) + (_RANK_0_LATER_S if self._rank == 0 else 0))
        end_now(ExitCode.HUNG)

    def _line(self) -> str:
        here = self._position
        return (
            f"no progress for {self._idle_s:.0f} s in step {here.step}, phase {here.phase}; "
            f"{self._heartbeats.missing(here, self._doing())}; stacks: {self._folder}"
        )


def _is_in_a_collective() -> bool:
    """Whether the main thread is, by its stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _dump_stacks(path: Path) -> None:
    faulthandler.dump_traceback(file=2)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"pid {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file=file)


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    end_now(ExitCode.HUNG)
