"""What DeepSpeed's engine saves and takes up again, on any number of ranks, and a step that it skips on the way."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import rank
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.errors import UserError
from tests.engine.zero_cases import CASES, Case, backward, make_engine, make_stage, train
from tests.gathered_pieces import Gathered, Whole, differing, gather

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

OTHER_WORLDS = [CASES[number] for number in (0, 2, 8, 9)]  # ZeRO 2 cuts as 1 does


@dataclass
class Skipped:
    """What happened in a step whose gradients one rank had made NaN."""

    norm: float
    refused: bool
    said: bool
    deepspeed_says: bool
    changed: list[str]


def skip_one(engine: DeepSpeedEngine) -> Skipped:
    before = gather(engine.pieces())
    last = engine.config.gradient_accumulation_steps - 1
    for micro in range(last):
        backward(engine, 0, micro, float("nan") if rank() == 0 and micro == 0 else 1.0)
        engine.step()
    backward(engine, 0, last, float("nan") if rank() == 0 and last == 0 else 1.0)
    norm, refused = float(engine.pending_norm()), False
    try:
        engine.step()
    except FloatingPointError:
        refused = True
    said = engine.step(skip=True)
    return Skipped(norm, refused, said, engine._engine.was_step_applied(), differing(before, gather(engine.pieces())))


def norms(engine: DeepSpeedEngine) -> tuple[float, float, float]:
    """Of a step's gradients: before it, by all of them, and as reported after it."""
    for micro in range(engine.config.gradient_accumulation_steps):
        if micro:
            engine.step()
        backward(engine, 0, micro)
    pending = float(engine.pending_norm())
    gradients = engine.full_gradients()
    engine.step()
    return pending, float(torch.nn.utils.get_total_norm(gradients.values())), engine.gradient_norm()


def stopped_and_resumed(case: Case) -> dict[str, object]:
    """Six steps, and three of them again by an engine with other weights, which skips a step that the first has not."""
    engine = make_engine(case, seed=0)
    train(engine, 0, 1, 2)
    saved = gather(engine.pieces())
    expected, end = train(engine, 3, 4, 5), gather(engine.pieces())
    engine.close()
    engine = make_engine(case, seed=1)
    engine.restore(Gathered(saved))
    taken_up = differing(saved, gather(engine.pieces()))
    found = train(engine, 3)
    skipped = skip_one(engine)
    found += train(engine, 4, 5)
    at_end = differing(end, gather(engine.pieces()))
    whole = {name: x for name, x in engine.full_parameters().items() if "weight" in name or "scale" in name}
    shown = [name for name, x in whole.items() if not x.flatten().equal(_weight(end, name))]
    measured = norms(engine)
    engine.close()
    return {
        "saved": saved,
        "losses": (expected, found),
        "taken up": taken_up,
        "at end": at_end,
        "shown": shown,
        "skipped": vars(skipped),
        "norms": measured,
    }


def _weight(whole: Whole, name: str) -> Tensor:
    return {**whole.get("frozen", {}), **whole["weights"]}.get(name, torch.empty(0))


def all_stopped_and_resumed() -> list[dict]:
    return [stopped_and_resumed(case) for case in CASES]


@pytest.fixture(scope="module")
def on_two(run_ranks, deepspeed_imported) -> list[list[dict]]:
    """Of each rank, for each case."""
    return run_ranks(2, all_stopped_and_resumed)


def each(on_two: list[list[dict]]) -> list[tuple[Case, dict]]:
    return [(case, found) for results in on_two for case, found in zip(CASES, results, strict=True)]


def test_a_resumed_run_is_the_run_that_never_stopped_bit_by_bit(on_two) -> None:
    for case, found in each(on_two):
        expected, resumed = found["losses"]
        assert found["taken up"] == [], case
        assert expected == resumed, case
        assert len(set(expected)) > 2 and "nan" not in expected, case
        assert found["at end"] == [], case


def test_the_weights_that_are_exported_are_those_of_the_pieces(on_two) -> None:
    for case, found in each(on_two):
        assert found["shown"] == [], case


def test_the_pieces_are_all_weights_and_all_of_the_optimizers_state(on_two) -> None:
    parts = {"adamw": ["exp_avg", "exp_avg_sq", "step"], "sgd": ["momentum_buffer"], "plain sgd": []}
    parts["adam"] = parts["adamw"]
    for case, found in each(on_two):
        stage = make_stage(0, case.frozen)
        trained = sorted(name for name, p in stage.named_parameters() if p.requires_grad)
        frozen = sorted(name for name, p in stage.named_parameters() if not p.requires_grad)
        saved = found["saved"]
        assert sorted(saved) == sorted(["weights", *parts[case.optimizer], *(["frozen"] if case.frozen else [])])
        assert all(list(saved[part]) == (frozen if part == "frozen" else trained) for part in saved), case
        assert {x.dtype for named in saved.values() for x in named.values()} == {torch.float32}
        sizes = {name: p.numel() for name, p in stage.named_parameters()}
        for part, named in saved.items():
            assert {n: x.numel() for n, x in named.items()} == ({n: 1 if part == "step" else sizes[n] for n in named})


def test_a_step_with_a_nan_on_one_rank_is_skipped_without_a_trace(on_two) -> None:
    """That what follows is as if it had not been, the comparison of losses and pieces shows."""
    for case, found in each(on_two):
        skipped = found["skipped"]
        assert skipped["norm"] != skipped["norm"], case
        assert skipped["refused"] and not skipped["said"] and not skipped["deepspeed_says"], case
        assert skipped["changed"] == [], case


def test_the_norm_is_known_before_the_step_on_every_rank(on_two) -> None:
    for case, found in each(on_two):
        pending, of_all, reported = found["norms"]
        assert pending == pytest.approx(of_all, rel=1e-5 if case.precision != "pure_bf16" else 0.01), case
        assert reported == pending > 0, case
    assert [of["norms"][0] for of in on_two[0]] == [of["norms"][0] for of in on_two[1]]


def taken_up_elsewhere(starts: list[Whole]) -> list[dict]:
    found = []
    for case, start in zip(OTHER_WORLDS, starts, strict=True):
        engine = make_engine(case, seed=1)
        engine.restore(Gathered(start))
        taken_up = differing(start, gather(engine.pieces()))
        losses = [float.fromhex(x) for x in train(engine, 3, 4, 5)]
        end = gather(engine.pieces())
        later = [float.fromhex(x) for x in train(engine, 6, 7, 8)]
        engine.close()
        found.append({"taken up": taken_up, "losses": losses, "end": end, "later": later})
    return found


def continued(starts: list[Whole]) -> list[dict]:
    found = []
    for case, start in zip(OTHER_WORLDS, starts, strict=True):
        engine = make_engine(case, seed=1)
        engine.restore(Gathered(start))
        found.append({"taken up": differing(start, gather(engine.pieces()))})
        found[-1]["losses"] = [float.fromhex(x) for x in train(engine, 6, 7, 8)]
        engine.close()
    return found


def close(case: Case, losses: list[float]) -> object:
    # Sums of gradients in another order; bf16 rounds each of them at 0.4 %.
    return pytest.approx(losses, rel=1e-5 if case.precision == "fp32" else 0.02)


@pytest.fixture(scope="module")
def on_one(run_ranks, on_two) -> list[dict]:
    return run_ranks(1, taken_up_elsewhere, starts_of(on_two))[0]


def starts_of(on_two: list[list[dict]]) -> list[Whole]:
    return [found["saved"] for case, found in zip(CASES, on_two[0], strict=True) if case in OTHER_WORLDS]


def losses_of(on_two: list[list[dict]]) -> list[list[float]]:
    found = [(case, [float.fromhex(x) for x in of["losses"][0]]) for case, of in zip(CASES, on_two[0], strict=True)]
    return [losses for case, losses in found if case in OTHER_WORLDS]


def test_one_rank_takes_up_what_two_have_saved(on_one, on_two) -> None:
    for case, found, losses in zip(OTHER_WORLDS, on_one, losses_of(on_two), strict=True):
        assert found["taken up"] == [], case
        assert found["losses"] == close(case, losses), case


def test_three_ranks_take_up_what_two_have_saved(run_ranks, on_two) -> None:
    for results in run_ranks(3, taken_up_elsewhere, starts_of(on_two)):
        for case, found, losses in zip(OTHER_WORLDS, results, losses_of(on_two), strict=True):
            assert found["taken up"] == [], case
            assert found["losses"] == close(case, losses), case


def test_two_ranks_take_up_what_one_has_saved(run_ranks, on_one) -> None:
    for results in run_ranks(2, continued, [found["end"] for found in on_one]):
        for case, found, before in zip(OTHER_WORLDS, results, on_one, strict=True):
            assert found["taken up"] == [], case
            assert found["losses"] == close(case, before["later"]), case


FOREIGN = "encoder.text.foreign.weight"


def refusals(case: Case) -> list[str]:
    engine = make_engine(case, seed=0)
    train(engine, 0)
    whole = gather(engine.pieces())
    found = []
    for part, name in (
        ("weights", "encoder.logit_scale"),
        ("frozen", "encoder.visual.stem.weight"),
        ("exp_avg", "encoder.logit_scale"),
        ("step", "encoder.logit_scale"),
        ("weights", FOREIGN),
        ("exp_avg_sq", "shorter"),
        ("step", "another"),
    ):
        damaged = copy.deepcopy(whole)
        if name == FOREIGN:
            damaged[part][name] = torch.zeros(1)
        elif name == "shorter":
            damaged[part] = {tensor: x[:1] for tensor, x in damaged[part].items()}
        elif name == "another":
            damaged[part]["encoder.logit_scale"] += 1
        else:
            del damaged[part][name]
        try:
            engine.restore(Gathered(damaged))
        except UserError as error:
            found.append(str(error))
    engine.close()
    return found


def test_a_state_that_is_not_whole_or_of_another_stage_is_refused(run_ranks) -> None:
    found = run_ranks(1, refusals, Case(1, "fp32", frozen=True))[0]
    remedy = "; resume with the configuration that the checkpoint was written with"
    assert found[:5] == [
        "checkpoint: encoder.logit_scale trains in the stage and not in the checkpoint" + remedy,
        "checkpoint: encoder.visual.stem.weight is frozen in the stage and not in the checkpoint" + remedy,
        "checkpoint: has no exp_avg of encoder.logit_scale; resume with the optimizer that it was written with",
        "checkpoint: has no step of encoder.logit_scale; resume with the optimizer that it was written with",
        f"checkpoint: {FOREIGN} trains in the checkpoint and not in the stage" + remedy,
    ]
    assert "exp_avg_sq" in found[5]
    assert "another number of steps" in found[6]


def before_the_first_step(case: Case) -> tuple[list[str], list[str], list[str]]:
    """A state that the optimizer had nothing in yet, taken up by an engine that has trained."""
    engine = make_engine(case, seed=0)
    start = gather(engine.pieces())
    engine.restore(Gathered(start))
    expected = train(engine, 0, 1)
    engine.restore(Gathered(start))
    taken_up = differing(start, gather(engine.pieces()))
    found = train(engine, 0, 1)
    engine.close()
    return sorted(start), taken_up, [a for a, b in zip(expected, found, strict=True) if a != b]


def all_before_the_first_step() -> list:
    return [before_the_first_step(case) for case in (CASES[3], CASES[8])]


def test_a_state_of_before_the_first_step_is_taken_up(run_ranks) -> None:
    for parts, taken_up, losses in run_ranks(1, all_before_the_first_step)[0]:
        assert parts in (["weights"], ["frozen", "weights"])
        assert taken_up == losses == []
