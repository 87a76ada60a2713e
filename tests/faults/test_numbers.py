"""Losses and gradients that are not what they should be: all ranks skip the step, and what a step moves stays."""

from collections.abc import Callable

import pytest

from reid_dist.exit_codes import ExitCode
from tests.faults.rig import Fault, Run, assert_clean, assert_same, saves

MOVED = ("weights", "exp_avg", "exp_avg_sq", "step", "queue", "key_encoder", "classifier")


def spoil(step: int = 5, value: str = "nan", **more: object) -> Fault:
    fault = {"rank": 1, "stage": "i2i", "step": step, "phase": "data", "kind": "spoil", "value": value, "row": 2}
    return {**fault, **more}


GRADIENT = {"rank": 0, "stage": "i2i", "step": 5, "phase": "data", "kind": "spoil_gradient", "value": "inf"}
SPIKE = {"rank": 1, "stage": "i2i", "step": 9, "phase": "data", "kind": "scale_loss", "by": 50.0}
SIGMA = "guard.spike_sigma=6"


def assert_skipped(run: Run, step: int) -> None:
    """The save after the step is the one before it, but for what counts steps and draws."""
    found = saves(run)
    parts = [found["parts", "i2i", done] for done in (step, step + 1)]
    assert set(MOVED) <= parts[0].keys()
    assert [parts[0][name] for name in MOVED] == [parts[1][name] for name in MOVED]
    for rank in range(2):
        own = [found[f"rank-{rank}", "i2i", done] for done in (step, step + 1)]
        assert own[0]["buffer"] == own[1]["buffer"] and own[0]["guard"] != own[1]["guard"]


@pytest.mark.fault("NaN in one sample")
@pytest.mark.fault("Inf in one rank's gradient")
@pytest.mark.fault("loss spike")
def test_skipped(new_run: Callable[..., Run]) -> None:
    """Three of them in one run."""
    check_skipped(new_run, [spoil(2), {**GRADIENT, "step": 4}, SPIKE])


@pytest.mark.every
@pytest.mark.fault("Inf in one sample")
@pytest.mark.fault("NaN in one rank's gradient")
def test_skipped_others(new_run: Callable[..., Run]) -> None:
    gradient = {**GRADIENT, "value": "nan", "rank": 1, "step": 4}
    check_skipped(new_run, [spoil(2, "inf"), gradient, {**SPIKE, "by": 1000.0}])


def check_skipped(new_run: Callable[..., Run], faults: list[Fault]) -> None:
    run = new_run("checkpoint.every=1", "stages.pretrain.steps=0", SIGMA)
    ended = run.fork(faults=faults)
    assert ended.codes == [0, 0], ended
    lines = [line for line in ended.out.splitlines() if " skipped: " in line]
    words = ["features not finite: ", "gradient norm is ", "deviations of"]
    assert len(lines) == 3, ended
    for count, (fault, line) in enumerate(zip(faults, lines, strict=True), 1):
        assert line.startswith(f"i2i: step {fault['step'] + 1} skipped: the ") and words[count - 1] in line, line
        assert f"1 in a row, {count} in all" in line, line
        assert_skipped(run, fault["step"])
    assert "cuhk_pedes" in lines[0] and "(rank 1)" in lines[0], lines[0]
    assert_clean(run, ended)


@pytest.mark.every
@pytest.mark.kill
@pytest.mark.fault("history of the guard survives")
@pytest.mark.parametrize("fault", [spoil(), SPIKE], ids=["NaN", "spike"])
def test_skips_survive_a_kill(new_run: Callable[..., Run], fault: Fault, tmp_path: object) -> None:
    """The same with a kill after the skipped step, or between the steps that the mean is of and the spike."""
    whole = new_run("checkpoint.every=1", SIGMA)
    assert whole.fork(faults=[fault]).codes == [0, 0]
    run = Run(whole.folder.with_name("killed"), whole.world, [SIGMA])
    kill = {"rank": 0, "stage": "i2i", "step": 8, "phase": "step", "kind": "kill"}
    ended = run.fork("checkpoint.asynchronous=false", faults=[fault, kill])
    assert sorted(ended.codes) == [-9, ExitCode.LOST_PEER], ended
    again = run.fork(faults=[fault] if fault["step"] > 6 else [])
    assert again.codes == [0, 0], again
    assert_same(run, whole)


@pytest.mark.fault("too many NaN in a row")
def test_too_many(reference: Run, new_run: Callable[..., Run]) -> None:
    """Three in a row end the run and name the samples; without them it goes on from the last save as planned."""
    run = new_run()
    ended = run.fork(faults=[spoil(step=3, steps=3)])
    assert ended.codes == [ExitCode.DIVERGED] * 2, ended
    (line,) = ended.said
    assert line.startswith("train.py: step 6: 3 steps in a row could not be made") and "cuhk_pedes" in line, ended
    again = run.fork()
    assert again.codes == [0, 0], again
    assert_clean(run, ended, again)
    assert_same(run, reference)
