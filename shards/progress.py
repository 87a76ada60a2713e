"""How far long work has come: a bar in a terminal, a plain line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_LOG_SECONDS = 30.0


class Progress:
    """Counts units until all are done; use it in a `with` statement.

    Args:
        what: is done, for the beginning of the line.
        unit: of the count, plural.
        total: units in all.
    """

    def __init__(self, what: str, unit: str, total: int) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = 0
        self._began = self._logged = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", disable=not self._terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def add(self, units: int) -> None:
        """Count units that are done."""
        self._done += units
        self._bar.update(units)
        now = time.monotonic()
        if not self._terminal and now - self._logged > _LOG_SECONDS:
            self._logged = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        left = (self._total - self._done) / rate if self._done else float("inf")
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.1f}/s, {left:,.0f} s left"
