"""Ranks stop at one step, whichever the signal reached."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from reid_dist import distributed
from reid_dist.supervision.agreement import StopAgreement
from reid_dist.supervision.signals import StopRequest
from tests.supervision.test_signals import until


def steps_until_stop(told: int, at_step: int) -> list[Any]:
    with StopRequest(grace_s=60) as request:
        agreement = StopAgreement(request)
        answers = []
        for step in range(at_step + 3):
            if step == at_step and distributed.rank() == told:
                os.kill(os.getpid(), signal.SIGUSR1)
                until(lambda: request.name)
            answers.append(agreement.poll())
        assert answers[-1] == agreement.poll() == request.name  # for good, and this rank's own wish now
        agreement.close()
        return answers


@pytest.mark.parametrize("told", [0, 1])
def test_all_ranks_get_the_answer_at_the_step_after(run_ranks: Callable[..., list[Any]], told: int) -> None:
    assert run_ranks(2, steps_until_stop, told, 3) == [[None] * 4 + ["SIGUSR1"] * 2] * 2


def test_a_single_rank_gets_it_at_once(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(1, steps_until_stop, 0, 3) == [[None] * 3 + ["SIGUSR1"] * 3]


def agree_at_once(told: int) -> list[Any]:
    with StopRequest(grace_s=60) as request:
        agreement = StopAgreement(request)
        before = [agreement.poll(), agreement.agree()]
        if distributed.rank() == told:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: request.name)
        return [*before, agreement.agree()]


def test_between_steps_they_wait_for_it(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(3, agree_at_once, 2) == [[None, None, "SIGTERM"]] * 3
