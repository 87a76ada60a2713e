"""Long work says how far it is, in a terminal and in a log."""

import sys

import pytest

from shards import progress as module
from shards.progress import Progress


def test_log_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress("x: writing", "images", 10_000) as bar:
        for _ in range(100):
            now[0] += 1
            bar.add(50)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"x: writing: {50 * second:,} of 10,000 images, 50.0/s, {(10_000 - 50 * second) // 50} s left"
        for second in (31, 62, 93)
    ]


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("x: writing", "images", 4) as bar:
        bar.add(3)
        bar.note("skipped: 5.jpg")
        bar.add(1)
    shown = capsys.readouterr().err
    assert "x: writing: 100%" in shown and "4/4" in shown and "images/s" in shown and "skipped: 5.jpg\n" in shown
