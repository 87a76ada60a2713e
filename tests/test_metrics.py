import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reid_dist.distributed import rank
from reid_dist.metrics import StageLog, say, write_scalars

MEASURED = {"learning_rate", "gradient_norm", "samples_per_s", "data_wait_percent", "bad_samples", "skipped_steps"}
MEASURED |= {"memory_gib"}


def make_log(folder: Path, total_steps: int = 5, log_every: int = 2) -> StageLog:
    return StageLog("t2i", folder, total_steps, 32, log_every)


def run_steps(log: StageLog, losses: list[list[float]], start: int = 0) -> None:
    """One list of micro-batch losses for each optimizer step."""
    for step, micro_batches in enumerate(losses, start):
        for loss in micro_batches:
            log.add({"loss": torch.tensor(loss), "logit_scale": torch.tensor([14.0])})
        log.step_done(step, learning_rate=0.1 * (step + 1), gradient_norm=lambda: 1.0, wait_seconds=0.0)
    log.close()


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_points_are_means_over_steps_and_micro_batches_since_the_last(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    run_steps(log, [[1.0, 2.0], [3.0, 6.0], [10.0, 10.0], [20.0, 20.0], [7.0, 9.0]])
    assert [point["step"] for point in log.history] == [2, 4, 5]  # the last step always
    assert [point["loss"] for point in log.history] == [3.0, 15.0, 8.0]
    assert [point["learning_rate"] for point in log.history] == pytest.approx([0.2, 0.4, 0.5])
    assert {point["logit_scale"] for point in log.history} == {14.0}


def test_tensorboard_has_every_value_under_the_stage_s_name(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    run_steps(log, [[1.0], [3.0], [10.0], [20.0], [7.0]])
    scalars = read_scalars(tmp_path)
    assert set(scalars) == {f"t2i/{key}" for key in {"loss", "logit_scale"} | MEASURED}
    assert scalars["t2i/loss"] == [(2, 2.0), (4, 15.0), (5, 7.0)]
    assert [step for step, _ in scalars["t2i/memory_gib"]] == [2, 4, 5]
    assert all(value > 0 for key in ("samples_per_s", "memory_gib") for _, value in scalars[f"t2i/{key}"])


def _log_on_this_rank(folder: Path) -> tuple[list[dict[str, float]], bool]:
    own = folder / f"rank{rank()}"
    log = make_log(own)
    run_steps(log, [[float(rank())], [10.0 + rank()], [1.0], [1.0], [1.0]])
    return log.history, own.exists()


def test_values_are_means_over_ranks_and_rank_0_alone_writes(run_ranks: Callable, tmp_path: Path) -> None:
    results = run_ranks(3, _log_on_this_rank, tmp_path)
    for history, _ in results:
        assert history[0]["loss"] == pytest.approx((0 + 10 + 1 + 11 + 2 + 12) / 6)
    assert [wrote for _, wrote in results] == [True, False, False]


def test_an_interval_without_a_step_is_said_and_leaves_no_point(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = make_log(tmp_path)
    run_steps(log, [[1.0], [3.0], [], [], [5.0]])
    assert [point["step"] for point in log.history] == [2, 5]
    assert "t2i 4/5: every step since the last line was skipped" in capsys.readouterr().out


def test_a_log_goes_on_where_its_state_was_taken(tmp_path: Path) -> None:
    """Within an interval, too, with numbers that decimals would round."""
    losses = [[0.1, 0.2], [1 / 3, 2 / 3], [1e-9, 7.0], [20.0, 20.1], [7.0, 9.0]]
    whole = make_log(tmp_path / "whole", log_every=4)
    run_steps(whole, losses)
    for stop in range(1, 5):
        first = make_log(tmp_path / f"first{stop}", log_every=4)
        run_steps(first, losses[:stop])
        second = make_log(tmp_path / f"second{stop}", log_every=4)
        second.load(json.loads(json.dumps(first.state())), stop, torch.device("cpu"))
        run_steps(second, losses[stop:], stop)
        found, expected = ([(p["step"], p["loss"].hex()) for p in log.history] for log in (second, whole))
        assert found == expected


def test_speed_and_data_wait_cover_the_steps_since_the_last_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("reid_dist.metrics.time.perf_counter", lambda: now[0])
    log = make_log(tmp_path, total_steps=3)
    for step, waited in enumerate([0.5, 1.0, 1.5]):
        now[0] += 2.0
        log.add({"loss": torch.tensor(1.0)})
        log.step_done(step, 0.1, lambda: 0.0, waited)
    log.close()
    # 2 steps of 32 samples in 4 s with 1 s of waiting, then 1 step in 2 s with half a second.
    assert [point["samples_per_s"] for point in log.history] == [16.0, 16.0]
    assert [point["data_wait_percent"] for point in log.history] == [25.0, 25.0]


def test_without_a_terminal_each_point_is_one_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_steps(make_log(tmp_path), [[1.0], [3.0], [10.0], [20.0], [7.0]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "t2i 2/5: loss 2.0000",
        "t2i 4/5: loss 15.0000",
        "t2i 5/5: loss 7.0000",
    ]
    assert not any("\r" in line for line in lines)


def test_adding_keeps_no_graph_and_waits_for_nothing(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.add({"loss": torch.ones((), requires_grad=True) * 2})
    assert not log._sums["loss"].requires_grad
    log.close()


def _say() -> None:
    say(f"rank {rank()}")


def test_only_rank_0_speaks(run_ranks: Callable, capfd: pytest.CaptureFixture) -> None:
    run_ranks(2, _say)
    assert capfd.readouterr().out == "rank 0\n"


def test_scalars_of_an_evaluation_are_written(tmp_path: Path) -> None:
    write_scalars(tmp_path, 3, {"evaluation/t2i/cuhk_pedes/R1": 41.5})
    assert read_scalars(tmp_path) == {"evaluation/t2i/cuhk_pedes/R1": [(3, 41.5)]}
