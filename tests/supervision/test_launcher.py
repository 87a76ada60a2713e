"""The guardian around real launchers: who gets a signal, what is left, and the exit code."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from launch import supervise
from reid_dist.exit_codes import ExitCode
from reid_dist.supervision import signals
from reid_dist.supervision.launcher import Ending, judge
from tests.supervision.launches import Launch

FAULT, WRONG, LOST, HUNG, MEMORY, STOPPED = (
    ExitCode.FAULT,
    ExitCode.WRONG_INPUT,
    ExitCode.LOST_PEER,
    ExitCode.HUNG,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.STOPPED,
)


@pytest.mark.parametrize(
    ("codes", "launcher", "told", "ending"),
    [
        ([0, 0], 0, False, Ending(0, False)),
        ([WRONG, None], 1, False, Ending(WRONG, False)),
        ([LOST, MEMORY], 70, False, Ending(MEMORY, False)),
        ([HUNG, LOST], 1, False, Ending(HUNG, True)),
        ([HUNG, LOST], 1, True, Ending(HUNG, False)),
        ([None, LOST], 247, False, Ending(LOST, True)),
        ([None, None], 247, False, Ending(LOST, True)),
        ([0, None], 1, False, Ending(LOST, True)),
        ([FAULT, LOST], 1, False, Ending(FAULT, False)),
        ([STOPPED, STOPPED], 1, True, Ending(STOPPED, False)),
        ([STOPPED, STOPPED], -9, False, Ending(STOPPED, True)),  # somebody killed the launcher
        ([143, STOPPED], 1, True, Ending(143, False)),
        ([], 2, False, Ending(2, False)),
        ([], -9, False, Ending(137, True)),
    ],
)
def test_the_rank_that_knows_most_gives_the_code(
    codes: list[int | None], launcher: int, told: bool, ending: Ending
) -> None:
    assert judge(codes, launcher, told) == ending


def guarded(launcher: str, program: str, folder: Path, *arguments: str, options: str = "") -> Launch:
    around = [sys.executable, "launch/supervise.py", *options.split(), "--"]
    return Launch(launcher, program, folder, *arguments, around=around)


def left_behind(launch: Launch) -> list[str]:
    """Files of its ranks: in the folder of a guardian, and what deepspeed's collectives share."""
    told = [launch.folder.glob(f"reid_dist-supervision-*/{pid}.rank") for pid in launch.pids()]
    shared = Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{launch.port}_*")
    return [str(file) for files in (*told, shared) for file in files]


def test_a_signal_to_deepspeeds_guardian_saves_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, deepspeed's outer process would die of it, and leave the ranks and their shared memory."""
    monkeypatch.setenv("LEAVE_SHM", "1")
    with guarded("deepspeed", "idling.py", tmp_path) as launch:
        ranks = launch.pids()
        launch.process.send_signal(signal.SIGUSR1)
        code, said = launch.end()
        assert code == STOPPED, said
        assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["SIGUSR1"] * 2
        assert launch.until_gone(*ranks, seconds=1) < 1
        assert left_behind(launch) == []


def test_a_signal_to_one_rank_stops_all_at_one_step_and_torchrun_hides_no_code(tmp_path: Path) -> None:
    with guarded("torchrun", "training.py", tmp_path, "none", "0") as launch:
        ranks = launch.pids()
        os.kill(ranks[1], signal.SIGTERM)
        code, said = launch.end()
        assert code == STOPPED, said
        saved = (tmp_path / "saved0").read_text()
        assert saved.startswith("SIGTERM") and saved == (tmp_path / "saved1").read_text()


def test_wrong_input_comes_back_and_is_not_tried_again(tmp_path: Path) -> None:
    with guarded("python", "idling.py", tmp_path, "wrong", options="--restarts 3") as launch:
        code, said = launch.end()
        assert code == WRONG and "starts again" not in said


def test_a_lost_rank_is_started_again(tmp_path: Path) -> None:
    with guarded("python", "idling.py", tmp_path, "once", options="--restarts 3") as launch:
        code, said = launch.end()
        assert (code, said) == (0, "supervise.py: ended with 70; starts again, 2 restarts left\n")


def test_a_rank_that_has_stopped_is_not_waited_for_long(tmp_path: Path) -> None:
    """torchrun would wait thirty seconds."""
    with guarded("torchrun", "idling.py", tmp_path) as launch:
        ranks = launch.pids()
        os.kill(ranks[1], signal.SIGSTOP)
        launch.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, said = launch.end()
        assert code == STOPPED, said
        assert time.monotonic() - began <= 15
        assert launch.until_gone(*ranks, seconds=1) < 1


def test_a_rank_that_does_not_save_is_killed_after_the_grace(tmp_path: Path) -> None:
    with guarded("python", "idling.py", tmp_path, "deaf", options="--grace 1") as launch:
        ranks = launch.pids()
        launch.process.send_signal(signal.SIGTERM)
        assert launch.end(10)[0] == 128 + signal.SIGTERM
        assert launch.until_gone(*ranks, seconds=1) < 1


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    with guarded("python", "idling.py", tmp_path, "deaf") as launch:
        launch.pids()
        launch.process.send_signal(signal.SIGUSR1)
        time.sleep(signals.ECHO_S + 0.3)
        launch.process.send_signal(signal.SIGTERM)
        code, said = launch.end(3)
        assert code == 128 + signal.SIGTERM and "SIGTERM after SIGUSR1: ends at once" in said


def test_nothing_outlives_a_killed_guardian(tmp_path: Path) -> None:
    with guarded("python", "idling.py", tmp_path, "deaf") as launch:
        ranks = launch.pids()
        assert left_behind(launch) != []
        launch.process.kill()
        assert launch.until_gone(*ranks) <= 5
        assert left_behind(launch) == []


def test_a_signal_before_there_are_ranks_ends_the_launcher(tmp_path: Path) -> None:
    with Launch(
        "python", "nothing.py", tmp_path, around=[sys.executable, "launch/supervise.py", "bash", "-c", "sleep 60"]
    ) as launch:
        launch.wait_for(lambda: len(launch._seen) > 1)
        time.sleep(0.3)
        launch.process.send_signal(signal.SIGINT)
        assert launch.end(10)[0] == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no program to start: name one after --"),
        (["--", "no-such-launcher"], "no program to start: no-such-launcher"),
        (["--restarts", "-1", "true"], "--restarts must not be negative"),
        (["--grace", "0", "true"], "--grace must be positive"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        supervise.main(arguments)
    assert refused.value.code == WRONG and words in capsys.readouterr().err
