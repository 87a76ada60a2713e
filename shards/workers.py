"""Jobs in worker processes that are as well behaved as none: they end with their parent and name what went wrong."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar, cast

from reid_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int], Any]

_REPORT_SECONDS = 0.2


class Interrupted(BaseException):
    """A signal asked this program to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_raise(last: bool = False) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise Interrupted, so that temporary files and processes are taken away.

    Args:
        last: the process ends behind it. A signal that comes then is too late, and must not change the exit code.
    """
    over = False

    def handle(number: int, frame: FrameType | None) -> None:
        if not over:
            raise Interrupted(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # Those that are ignored stay so: nohup.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        over = True
        for number, handler in before.items():
            # Python takes its own handlers away before the process ends; what is ignored stays ignored.
            signal.signal(number, signal.SIG_IGN if last else handler)


def processors() -> int:
    """Processors that this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job, Progress], Result], jobs: Iterable[Job], workers: int, progress: Progress
) -> Generator[Result, None, None]:
    """Results of `function(job, progress)` as they are finished, in any order.

    Close the iterator (`contextlib.closing`) to end the processes at once.

    Args:
        function: of a module, as it is sent to processes; it calls `progress` with the number of units done.
        jobs: taken one by one; one for each process is under way.
        workers: processes; with 1 everything is done in this one.
        progress: called here.

    Raises:
        UserError: as raised by a job; also OSError.
        OSError: a process was killed.
    """
    if workers <= 1:
        for job in jobs:
            yield function(job, progress)
        return
    pool = _Pool(function, workers)
    try:
        yield from pool.run(iter(jobs), progress)
    finally:
        pool.end()


class _Pool:
    def __init__(self, function: Callable[[Any, Progress], Any], workers: int) -> None:
        # Not fork: a process with threads (the progress bar has one) must not be copied.
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        try:
            for _ in range(workers):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, function), daemon=True)
                process.start()
                there.close()
                self._processes[here] = process
        except BaseException:
            self.end()
            raise

    def run(self, jobs: Iterator[Job], progress: Progress) -> Iterator[Any]:
        busy = {connection for connection in self._processes if self._give(connection, jobs)}
        while busy:
            for connection in cast(list[Connection], wait(list(busy))):
                kind, content = self._receive(connection)
                if kind == "progress":
                    progress(content)
                elif kind == "error":
                    raise content
                elif kind == "crash":
                    raise RuntimeError(f"in a worker process:\n{content}")
                else:
                    if not self._give(connection, jobs):
                        busy.remove(connection)
                    yield content

    def end(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()

    def _give(self, connection: Connection, jobs: Iterator[Job]) -> bool:
        for job in jobs:
            try:
                connection.send(job)
            except OSError:
                raise self._dead(connection) from None
            return True
        return False

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            return cast(tuple[str, Any], connection.recv())
        except (EOFError, OSError):
            raise self._dead(connection) from None

    def _dead(self, connection: Connection) -> OSError:
        process = self._processes[connection]
        process.join(5)
        return OSError(
            f"a worker process ended with exit code {process.exitcode} (-9: killed, often for want of memory); "
            f"run the same command again to continue, with fewer workers"
        )


def _serve(connection: Connection, function: Callable[[Any, Progress], Any]) -> None:
    """Do the jobs that arrive until the other end is closed, by the parent or by its death."""
    # Ctrl-C and a cluster's SIGTERM reach the whole group; the parent ends the processes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    done, reported = 0, time.monotonic()

    def report(units: int) -> None:
        nonlocal done, reported
        done += units
        if time.monotonic() - reported > _REPORT_SECONDS:
            connection.send(("progress", done))
            done, reported = 0, time.monotonic()

    try:
        while True:
            job = connection.recv()
            answer = _answer(job, function, report)
            connection.send(("progress", done))
            done = 0
            connection.send(answer)
    except (EOFError, OSError):
        return


def _answer(job: Any, function: Callable[[Any, Progress], Any], report: Progress) -> tuple[str, Any]:
    try:
        return "result", function(job, report)
    except (UserError, OSError) as error:
        return "error", error
    except Exception:
        return "crash", traceback.format_exc()
