"""Signals that tell a run to stop, as a wish of the process they reached; `agreement` makes it the wish of all."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from reid_dist.exit_codes import ExitCode
from reid_dist.supervision.leaving import end_now, say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Terminals and launchers send one wish to all processes and each other: what comes so soon is the first one's echo.
ECHO_S = 1.0

_entered: "StopRequest | None" = None


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 as a wish to save and stop; a context manager for the main thread.

    The first is remembered, and the process ended (71) where that takes too long; a second, more than a second later,
    ends it at once (128 + number). A thread hears them: also while the main thread waits for another rank. On exit
    the earlier handlers return; after a stop, signals are ignored instead, since launchers end a rank that another
    was a little faster than. Processes forked inside ignore the signals, and end with this one.

    Args:
        grace_s: from the wish to the end of the process, at most.

    Attributes:
        name: of the signal, on this rank or, once agreed, another; None until then.
    """

    def __init__(self, grace_s: float) -> None:
        self.name: str | None = None
        self._grace_s = grace_s
        self._heard_at: float | None = None
        self._saved = False

    def __enter__(self) -> "StopRequest":
        global _entered
        self._hears, self._told = socket.socketpair()
        self._told.setblocking(False)
        # Before the handlers: what comes in between is heard.
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.siginterrupt(number, False)  # libraries' waits go on: the thread is told by the interpreter
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        _entered = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _entered
        _entered = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler if self.name is None else signal.SIG_IGN)
        signal.set_wakeup_fd(self._wakeup)
        self._told.shutdown(socket.SHUT_RDWR)  # ends the thread, though forked children hold copies
        self._told.close()

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Inside, a wish ends this process at once (75): all that was done is on the disk, or nothing was done yet."""
        self._saved = True
        if self.name is not None:
            self._leave(self.name)
        try:
            yield
        finally:
            self._saved = False

    def take(self, number: int) -> None:
        """Takes up the wish that a signal stands for; from here on the process has `grace_s` to end."""
        if self.name is None:
            self.name = signal.Signals(number).name
            threading.Thread(target=self._end_late, name="grace", daemon=True).start()

    def leave_to_parent(self) -> None:
        """In a forked child: signals to the whole group are for its parent, which still needs it to save."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        # It is also how a parent ends a child that hangs.
        signal.signal(signal.SIGTERM, self._end_child_late)

    def _listen(self) -> None:
        hears = self._hears
        while numbers := hears.recv(64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._hear(number)
        hears.close()

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._heard_at is None:
            self._heard_at = now
            if self._saved:
                self._leave(signal.Signals(number).name)
            self.take(number)
        elif now - self._heard_at > ECHO_S:
            say(f"{signal.Signals(number).name} after {self.name}: ends at once, without saving")
            end_now(128 + number)

    def _leave(self, name: str) -> None:
        say(f"{name}: stopped; start again to go on")
        end_now(ExitCode.STOPPED)

    def _end_late(self) -> None:
        time.sleep(self._grace_s)
        say(f"{self.name}, but not saved {self._grace_s:g} s later: ends; the last checkpoint stands")
        end_now(ExitCode.HUNG)

    def _end_child_late(self, number: int, frame: FrameType | None) -> None:
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)  # SIGALRM ends it


def _note(number: int, frame: FrameType | None) -> None:
    """A handler there must be, or the interpreter would write nothing to the socket."""


def _after_fork() -> None:
    if _entered is not None:
        _entered.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
