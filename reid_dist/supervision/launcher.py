"""A guardian around `deepspeed` and `torchrun`: signals reach the ranks, nothing outlives them, their code comes back.

On a signal `deepspeed` dies and leaves its ranks behind, `torchrun` gives them thirty seconds; for a rank that hangs
both wait that long, and neither returns the code that a rank ended with.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from reid_dist.exit_codes import ExitCode
from reid_dist.supervision import processes
from reid_dist.supervision.leaving import FOLDER, Rank, remove_shared_memory
from reid_dist.supervision.signals import ECHO_S, STOP_SIGNALS

_POLL_S = 0.1
# From one rank's bad end, or the launcher's, to everybody's; ranks without a launcher need four and a half.
_TOGETHER_S = 6.0
_AT_ONCE_S = 3.0  # after a second signal
_PAUSE_S = 5.0  # before the second restart; before each further one so much more
# Of the ranks' codes the first of these is the run's: it says why, where others only say that.
_REASONS = (
    ExitCode.WRONG_INPUT,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.DIVERGED,
    ExitCode.NO_CHECKPOINT,
    ExitCode.HUNG,
)


def supervise(command: Sequence[str], restarts: int, grace_s: float, say: Callable[[str], None]) -> int:
    """Runs a launcher's command, again where a machine is to blame, and returns the code of its ranks.

    Started again is what lost a rank (70), hung (71) or was killed; not what was told to stop (75) or what would end
    so again. Called in the main thread of a process without other children.

    Args:
        command: of the launcher; its ranks call `leaving.supervised`.
        restarts: at most.
        grace_s: from a signal to the end, at most.
        say: gets a line for each start after the first.
    """
    processes.adopt_orphans()
    with _signals() as told:
        for left in range(restarts, -1, -1):
            ending = _Start(command, grace_s, told).run()
            if not (ending.again and left):
                break
            say(f"ended with {ending.code}; starts again, {left - 1} restarts left")
            # A node, port or file system that is away for a moment must not use up all of them.
            with contextlib.suppress(queue.Empty):
                return 128 + told.get(timeout=_PAUSE_S * (restarts - left))
    return ending.code


@contextlib.contextmanager
def _signals() -> Iterator["queue.SimpleQueue[int]"]:
    """What this process is told, to be read between other things."""
    told: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be put to while it is read from

    def note(number: int, frame: FrameType | None) -> None:
        told.put(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Ending:
    """How a start ended.

    Attributes:
        code: for the caller.
        again: whether another start may do better.
    """

    code: int
    again: bool


def judge(codes: Sequence[int | None], launcher: int, told: bool) -> Ending:
    """Makes one ending of many.

    Args:
        codes: what each rank said, None for one that was killed without a word.
        launcher: its exit code, negative for a signal.
        told: whether the run was told to stop.
    """
    killed = launcher < 0 and not told
    if not codes:  # it ended before there were ranks
        return Ending(128 - launcher if launcher < 0 else launcher, killed)
    signals = [code for code in codes if code and code not in list(ExitCode)]  # 128 + number: told twice
    for reason in (*_REASONS, *signals, ExitCode.FAULT):
        if reason in codes:
            return Ending(reason, reason == ExitCode.HUNG and not told)
    if ExitCode.STOPPED in codes:
        return Ending(ExitCode.STOPPED, killed)
    if ExitCode.LOST_PEER in codes or None in codes:
        return Ending(ExitCode.LOST_PEER, not told)
    return Ending(ExitCode.DONE, False)


class _Start:
    """One start of the launcher, in a session of its own: what reaches this process's group does not reach it."""

    def __init__(self, command: Sequence[str], grace_s: float, told: "queue.SimpleQueue[int]") -> None:
        self._command = command
        self._grace_s = grace_s
        self._told = told
        self._signals: list[int] = []
        self._told_at = float("inf")
        self._deadline = float("inf")

    def run(self) -> Ending:
        with tempfile.TemporaryDirectory(prefix="reid_dist-supervision-", ignore_cleanup_errors=True) as name:
            self._folder = Path(name)
            self._launcher = subprocess.Popen(self._command, start_new_session=True, env=os.environ | {FOLDER: name})
            (self._folder / "launcher").write_text(str(self._launcher.pid))
            while self._lives():
                self._pass_on_signals()
                self._look_at_ranks()
                if time.monotonic() > self._deadline:
                    self._kill()
                time.sleep(_POLL_S)
            return self._end()

    def _lives(self) -> bool:
        """Whether anything of it still runs; takes leave of what does not."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._launcher.pid:
                    self._launcher.returncode = os.waitstatus_to_exitcode(ended[1])
                    self._end_within(_TOGETHER_S)
        return self._launcher.returncode is None or bool(processes.descendants())

    def _pass_on_signals(self) -> None:
        while not self._told.empty():
            number = self._told.get()
            self._signals.append(number)
            ranks = [processes.find(rank.pid, rank.began) for rank in self._ranks()]
            for process in ranks or processes.descendants():  # before there are ranks nothing is lost
                if process is not None:
                    process.signal(number if ranks else signal.SIGTERM)
            now = time.monotonic()
            again = now - self._told_at > ECHO_S  # sooner it is the same wish, as SLURM and Ctrl-C send it
            self._told_at = min(self._told_at, now)
            self._end_within(_AT_ONCE_S if again or not ranks else self._grace_s)

    def _look_at_ranks(self) -> None:
        # A rank's bad end is everybody's; so is the end of one that was told to stop, since all save together.
        if any(self._code(rank) != 0 for rank in self._ranks() if processes.find(rank.pid, rank.began) is None):
            self._end_within(_TOGETHER_S)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _kill(self) -> None:
        for process in processes.descendants():
            process.signal(signal.SIGKILL)

    def _end(self) -> Ending:
        ranks = self._ranks()
        for rank in ranks:
            remove_shared_memory(rank.port, rank.local_rank)
        codes = [self._code(rank) for rank in ranks]
        if self._signals and all(code is None for code in codes):  # it was too early or too late to save
            return Ending(128 + self._signals[-1], False)
        return judge(codes, self._launcher.returncode or 0, bool(self._signals))

    def _ranks(self) -> list[Rank]:
        return [Rank(**json.loads(entry.read_text())) for entry in self._folder.glob("*.rank")]

    def _code(self, rank: Rank) -> int | None:
        """What it said that it ends with; None when it has not."""
        try:
            return int((self._folder / f"{rank.pid}.code").read_text())
        except (OSError, ValueError):
            return None
