"""How programs end when a signal comes late: the exit code tells of the work, in processes of their own."""

import signal
import subprocess
import sys

import pytest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Signals itself inside its work (where asked), behind it, and while the interpreter takes itself apart.
PROGRAM = """
import os, sys
from shards.command import exit_code

number, inside, last = int(sys.argv[1]), sys.argv[2] == "inside", sys.argv[3] == "last"

def send():
    os.kill(os.getpid(), number)

class Late:
    def __del__(self, kill=os.kill, getpid=os.getpid, number=number, finalizing=sys.is_finalizing):
        assert finalizing()
        print("late", flush=True)
        kill(getpid(), number)

os.late = Late()

def work():
    if inside:
        send()
    return 0

code = exit_code(work, ", begin again", last)
send()
sys.exit(code)
"""


def ended(number: int, where: str, last: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", PROGRAM, str(int(number)), where, last]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_behind_the_work_does_not_change_how_it_ended(number: int) -> None:
    assert ended(number, "behind", "last") == (0, "late\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_does_not_change_what_the_first_one_did(number: int) -> None:
    assert ended(number, "inside", "last") == (128 + number, "late\n", "error: interrupted, begin again\n")


def test_within_another_program_its_handlers_come_back() -> None:
    assert ended(signal.SIGTERM, "behind", "within")[0] == -signal.SIGTERM
