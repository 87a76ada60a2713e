"""Which steps are made: the decision on real ranks, the samples that are named, the window, what a resume keeps."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reid_dist.config import GuardConfig
from reid_dist.distributed import note_waits, rank
from reid_dist.errors import NonFiniteError
from reid_dist.guard import Guard
from reid_dist.stages import Batch

ROWS, FEATURES = 4, 3
GOOD = [[1.0, 2.0], [1.5, 0.5], [1.0, 1.0]]  # losses of two micro-batches on each rank


class StubStage(nn.Module):
    """Features of a row are its inputs; the statistics of a BatchNorm move with every forward in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.beside: list[Tensor] = []

    def leaves(self) -> list[Tensor]:
        return self.beside

    def features(self, batch: Batch, state: dict[str, Any]) -> dict[str, Tensor]:
        image_BD = self.norm(batch["image_BD"])
        text = {"text_BD": batch["text_BD"]} if "text_BD" in batch else {}
        return {"image_BD": image_BD, "log_scale": torch.zeros(()), **text}


class StubEngine:
    def __init__(self) -> None:
        self.stage = StubStage().train()

    def run(self, part: Callable[[Batch], Any], batch: Batch) -> Any:
        return part(batch)


def batch(number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    first = 1000 * rank() + 100 * number
    return {
        "image_BD": torch.randn(ROWS, FEATURES, generator=generator),
        "sample_id_B": torch.arange(first, first + ROWS),
    }


def make(**settings: Any) -> Guard:
    return Guard(GuardConfig(**settings), StubEngine(), lambda sample: f"key{sample}")  # type: ignore[arg-type]


def losses(values: list[float]) -> list[Tensor]:
    return [torch.tensor(x) for x in values]


def step(guard: Guard, number: int, own: list[float], norm: float, batches: list[Batch] | None = None) -> str:
    """The line of a step, or what was raised."""
    guard.begin()
    try:
        verdict = guard.admit(number, losses(own), torch.tensor(norm), batches or [batch(0), batch(1)])
    except NonFiniteError as error:
        return f"raised {error}"
    assert verdict.skip == bool(verdict.line)
    return verdict.line


def _decisions() -> dict[str, str]:
    lines, me = {}, rank()
    own = GOOD[me]
    lines["good"] = step(make(), 0, own, 1.0)
    for bad in (math.nan, math.inf, -math.inf):
        lines[f"loss {bad}"] = step(make(), 6, [own[0], bad] if me == 1 else own, 1.0)
        lines[f"norm {bad}"] = step(make(), 6, own, bad)
        lines[f"norm of one {bad}"] = step(make(), 6, own, bad if me == 2 else 1.0)
    guard = make()
    leaf = torch.zeros(2, 2, requires_grad=True)
    leaf.grad = torch.full((2, 2), math.nan if me == 0 else 1.0)
    guard._engine.stage.beside = [leaf]  # type: ignore[attr-defined]
    lines["centres"] = step(guard, 6, own, 1.0)
    lines["cached"] = step(make(), 6, [math.nan], 1.0)
    return lines


@pytest.fixture(scope="module")
def decisions(run_ranks: Callable) -> list[dict[str, str]]:
    return run_ranks(3, _decisions)


def test_all_ranks_decide_alike_and_say_the_same(decisions: list[dict[str, str]]) -> None:
    assert decisions[0] == decisions[1] == decisions[2]
    assert [name for name, line in decisions[0].items() if not line] == ["good"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_rank_and_the_samples_of_its_micro_batch(
    bad: float, decisions: list[dict[str, str]]
) -> None:
    assert decisions[0][f"loss {bad}"] == (
        f"step 7 skipped: the loss is {bad} on rank 1 of 3; losses not finite, though all features are:"
        " key1100 (rank 1); key1101 (rank 1); key1102 (rank 1); key1103 (rank 1) (1 in a row, 1 in all)"
    )


def test_a_gradient_that_is_not_finite_blames_no_sample(decisions: list[dict[str, str]]) -> None:
    innocent = "; features and losses of all samples are finite (1 in a row, 1 in all)"
    assert decisions[0]["norm nan"] == f"step 7 skipped: the gradient norm is nan on every rank{innocent}"
    assert decisions[0]["norm of one inf"] == f"step 7 skipped: the gradient norm is inf on rank 2 of 3{innocent}"
    assert "the gradient norm of the class centres is nan on rank 0 of 3" in decisions[0]["centres"]


def test_one_loss_for_several_micro_batches_names_the_samples_of_all(decisions: list[dict[str, str]]) -> None:
    assert "the loss is nan on every rank" in decisions[0]["cached"]
    first = [f"key{100 * batch + row} (rank 0)" for batch in range(2) for row in range(ROWS)]
    assert f": {'; '.join(first)}; and 16 more (1 in a row" in decisions[0]["cached"]  # of 3 ranks


def _culprit(captioned: bool) -> str:
    """All losses are NaN, as contrastive ones are, of one bad row of rank 1's second micro-batch."""
    batches = [batch(0), batch(1)]
    if captioned:  # two of the four rows have text
        for one in batches:
            one |= {"token_BL": torch.ones(2, 5), "text_BD": torch.ones(2, FEATURES)}
            one["captioned_B"] = torch.tensor([False, True, False, True])
    if rank() == 1:
        batches[1]["text_BD" if captioned else "image_BD"][1, 2] = math.inf
    return step(make(), 0, [math.nan, math.nan], math.nan, batches)


@pytest.mark.parametrize(("captioned", "key"), [(False, "key1101"), (True, "key1103")])
def test_the_sample_whose_features_are_not_finite_is_named_alone(
    captioned: bool, key: str, run_ranks: Callable
) -> None:
    for line in run_ranks(2, _culprit, captioned):
        assert f"the loss is nan on every rank; features not finite: {key} (rank 1) (1 in a row" in line
        assert line.count("key") == 1


def test_many_samples_are_counted_not_listed() -> None:
    big = {"image_BD": torch.full((50, FEATURES), math.nan), "sample_id_B": torch.arange(50)}
    line = step(make(), 0, [math.nan], 1.0, [big])
    assert "key7 (rank 0); and 42 more (1 in a row" in line and line.count("key") == 8


def test_a_skipped_step_leaves_the_running_statistics_and_the_next_culprit_is_found_by_them() -> None:
    guard = make()
    stage = guard._engine.stage
    stage.norm(torch.randn(8, FEATURES))  # type: ignore[operator]
    before = {name: x.clone() for name, x in stage.norm.state_dict().items()}  # type: ignore[operator]
    poisoned = batch()
    poisoned["image_BD"][2] = math.nan
    for number in range(2):
        guard.begin()
        assert stage.features(poisoned, {})["image_BD"].isnan().all()  # one row spoils all
        assert stage.norm.running_mean.isnan().all()  # type: ignore[union-attr, operator]
        verdict = guard.admit(number, losses([math.nan]), torch.tensor(math.nan), [poisoned])
        assert "not finite: key2 (rank 0)" in verdict.line
        assert all(x.equal(before[name]) for name, x in stage.norm.state_dict().items())  # type: ignore[operator]
    assert stage.training
    guard.begin()
    stage.features(batch(), {})
    assert not guard.admit(2, losses([1.0]), torch.tensor(1.0), [batch()]).skip
    assert not stage.norm.running_mean.equal(before["running_mean"])  # type: ignore[operator]


def _a_step_that_is_made() -> tuple[int, bool]:
    def untouched() -> Iterator[Batch]:
        raise AssertionError("looked at the batches")
        yield

    guard, waits = make(spike_sigma=3.0), []
    guard.begin()
    note_waits(waits)
    verdict = guard.admit(0, losses(GOOD[rank()]), torch.tensor(1.0), untouched())
    note_waits(None)
    return len(waits), verdict.skip


def test_a_step_that_is_made_costs_one_collective_and_no_look_at_the_batches(run_ranks: Callable) -> None:
    assert run_ranks(2, _a_step_that_is_made) == [(1, False)] * 2


def _until_it_ends(pattern: list[bool]) -> list[str]:
    guard = make(max_skips=3)
    found = []
    for number, bad in enumerate(pattern):
        found.append(step(guard, number, [math.nan if bad and rank() == 1 else 1.0], 1.0, [batch(number)]))
    assert guard.skipped == sum(pattern)
    return found


def test_skips_in_a_row_end_the_run_on_every_rank_with_the_keys_and_others_do_not(run_ranks: Callable) -> None:
    pattern = [True, True, False, True, True, True]
    first, second = run_ranks(2, _until_it_ends, pattern)
    assert first == second
    assert [line.startswith("raised") for line in first] == [False] * 5 + [True]
    assert "(2 in a row, 2 in all)" in first[1] and "(1 in a row, 3 in all)" in first[3]
    assert first[5].startswith("raised step 6: 3 steps in a row could not be made (guard.max_skips), this one because")
    assert (
        "; samples: key1300; key1301; key1302; key1303; key1400; key1401; key1402; key1403; and 4 more; exclude"
        in first[5]
        and "key1000" not in first[5]
    )
    assert "\n" not in first[5]


def spiky(count: int) -> list[tuple[float, float]]:
    """Losses and norms that fall, with spikes in one, the other or both, and numbers that are not finite."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64).tolist()
    series = [(3 / (1 + 0.1 * n) + 0.05 * a, 1 + 0.2 * b) for n, (a, b) in enumerate(noise)]
    for place, (loss, norm) in {3: (9, 9), 20: (9, 1), 21: (1, 30), 33: (math.nan, 1), 34: (9, math.inf)}.items():
        series[place] = (float(loss), float(norm))
    return series


def expected_skips(series: list[tuple[float, float]], sigma: float, window: int) -> list[int]:
    kept: list[tuple[float, float]] = []
    skipped = []
    for number, pair in enumerate(series):
        last = kept[-window:]
        leaps = len(last) >= max(2, window // 2) and any(
            value > statistics.fmean(history) + sigma * statistics.stdev(history)
            for value, history in zip(pair, zip(*last, strict=True), strict=True)
        )
        if leaps or not all(math.isfinite(x) for x in pair):
            skipped.append(number)
        else:
            kept.append(pair)
    return skipped


@pytest.mark.parametrize("window", [2, 5, 16])
def test_spikes_are_skipped_by_the_published_rule_over_the_steps_that_were_made(window: int) -> None:
    series = spiky(60)
    guard = make(spike_sigma=6.0, window=window, max_skips=60)
    lines = [step(guard, number, [loss], norm) for number, (loss, norm) in enumerate(series)]
    found = [number for number, line in enumerate(lines) if line]
    assert found == expected_skips(series, 6.0, window)
    assert {20, 21, 33, 34} <= set(found)
    assert "deviations" in lines[20] and "the loss 9 is more than 6" in lines[20]
    assert "the gradient norm 30 is more than" in lines[21]


def test_without_a_sigma_no_finite_step_is_skipped() -> None:
    guard = make(window=4)
    assert [step(guard, n, [x], x) for n, x in enumerate([1.0, 1.0, 1.0, 1.0, 1e30])] == [""] * 5


def test_a_level_that_stays_counts_as_no_deviation() -> None:
    guard = make(window=4, spike_sigma=6.0)
    assert [step(guard, n, [2.0], 1.0) for n in range(9)] == [""] * 9


def _mean_over_ranks() -> str:
    guard = make(window=4, spike_sigma=2.0)
    for number, x in enumerate([1.0, 1.1, 0.9, 1.0]):
        assert not step(guard, number, [x, x], 1.0)
    return step(guard, 4, [1.0, 5.0] if rank() == 1 else [1.0, 1.0], 1.0)


def test_a_spike_is_one_of_the_mean_over_ranks_and_micro_batches(run_ranks: Callable) -> None:
    first, second = run_ranks(2, _mean_over_ranks)
    assert first == second and "the loss 2 is more than 2 deviations of 0.082 above the mean 1 of the last 4" in first


def test_a_resumed_guard_decides_and_ends_as_one_that_never_stopped() -> None:
    series = spiky(60)
    whole = make(spike_sigma=6.0, window=8)
    lines = [step(whole, n, [loss], norm) for n, (loss, norm) in enumerate(series)]
    for stop in (21, 34, 35, 50):  # in the middle of skips in a row too
        first, second = make(spike_sigma=6.0, window=8), make(spike_sigma=6.0, window=8)
        again = [step(first, n, [loss], norm) for n, (loss, norm) in enumerate(series[:stop])]
        second.load(json.loads(json.dumps(first.state())))
        again += [step(second, n + stop, [loss], norm) for n, (loss, norm) in enumerate(series[stop:])]
        assert again == lines
        assert second.state() == whole.state() and second.skipped == whole.skipped


def test_the_state_is_exact_and_a_resume_keeps_who_was_blamed() -> None:
    guard = make(max_skips=3)
    third = 1.0 / 3
    assert not guard.admit(0, [torch.tensor(third, dtype=torch.float64)], torch.tensor(0.1), []).skip
    for number in (1, 2):
        step(guard, number, [math.nan], 1.0, [batch(number)])
    state = json.loads(json.dumps(guard.state()))
    assert [float.fromhex(x) for x in state["losses"]] == [third]
    assert [float.fromhex(x) for x in state["norms"]] == [float(torch.tensor(0.1))]
    resumed = make(max_skips=3)
    resumed.load(state)
    end = step(resumed, 3, [math.nan], 1.0, [batch(3)])
    assert end.startswith("raised step 4: 3 steps in a row") and "samples: key100; key101" in end


def test_a_shorter_window_takes_up_the_newest() -> None:
    guard = make(window=8)
    for number in range(8):
        step(guard, number, [float(number)], 1.0)
    shorter = make(window=3)
    shorter.load(guard.state())
    assert [float.fromhex(x) for x in shorter.state()["losses"]] == [5.0, 6.0, 7.0]
