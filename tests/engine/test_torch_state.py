"""What torch's engine saves and takes up again, on any number of ranks and from DeepSpeed, and steps that it skips."""

import pytest

from reid_dist.config import EngineConfig
from reid_dist.distributed import rank
from reid_dist.engine.base import Engine
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.engine.torch_engine import TorchEngine
from reid_dist.errors import UserError
from tests.engine.zero_cases import OPTIMIZERS, ROWS, Case, backward, make_stage, train
from tests.gathered_pieces import Gathered, Whole, differing, gather

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

CASES = [
    Case(0, "fp32", accumulation=2, clip=0.5),
    Case(1, "fp32", "sgd", frozen=True, accumulation=2),
    Case(2, "bf16", "adam"),
    Case(3, "fp32", frozen=True, accumulation=2, clip=0.5),
]


def make_engine(case: Case, seed: int, backend: type[Engine] = TorchEngine) -> Engine:
    config = EngineConfig(
        backend="deepspeed" if backend is DeepSpeedEngine else "torch",
        zero_stage=case.zero_stage,
        precision=case.precision,
        gradient_accumulation_steps=case.accumulation,
        max_grad_norm=case.clip,
    )
    return backend(make_stage(seed, case.frozen).train(), config, OPTIMIZERS[case.optimizer], ROWS)


def skip_one(engine: Engine) -> dict[str, object]:
    """A step whose gradients one rank has made NaN."""
    before = gather(engine.pieces())
    last = engine.config.gradient_accumulation_steps - 1
    for micro in range(last + 1):
        backward(engine, 0, micro, float("nan") if rank() == 0 and micro == 0 else 1.0)
        if micro < last:
            engine.step()
    norm, before_it = float(engine.pending_norm()), engine.gradient_norm()
    said = engine.step(skip=True)
    return {
        "norm": norm,
        "said": said,
        "reported": (before_it, engine.gradient_norm()),
        "changed": differing(before, gather(engine.pieces())),
    }


def stopped_and_resumed(case: Case) -> dict[str, object]:
    """Four steps, and two of them again by an engine with other weights, which skips a step that the first has not."""
    engine = make_engine(case, seed=0)
    train(engine, 0, 1)
    saved = gather(engine.pieces())
    expected, end = train(engine, 2, 3), gather(engine.pieces())
    engine.close()
    engine = make_engine(case, seed=1)
    list(engine.exact_parameters())  # as a key encoder's start does; it gathers the weights
    engine.restore(Gathered(saved))
    taken_up = differing(saved, gather(engine.pieces()))
    found = train(engine, 2)
    skipped = skip_one(engine)
    found += train(engine, 3)
    at_end = differing(end, gather(engine.pieces()))
    held = {**end.get("frozen", {}), **end["weights"]}
    exported = engine.full_parameters(list(held))
    shown = [name for name, x in exported.items() if not x.flatten().equal(held[name])]
    engine.close()
    return {
        "saved": saved,
        "losses": (expected, found),
        "taken up": taken_up,
        "at end": at_end,
        "shown": shown,
        "skipped": skipped,
    }


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
        assert len(set(expected)) == len(expected) and "nan" not in expected, case
        assert found["at end"] == [], case


def test_the_weights_that_are_exported_are_those_of_the_pieces(on_two) -> None:
    for case, found in each(on_two):
        assert found["shown"] == [], case


def test_the_pieces_are_all_weights_and_all_of_the_optimizers_state(on_two) -> None:
    parts = {"adamw": ["exp_avg", "exp_avg_sq", "step"], "sgd": ["momentum_buffer"], "plain sgd": []}
    parts["adam"] = parts["adamw"]
    for case, found in each(on_two):
        stage, saved = make_stage(0, case.frozen), found["saved"]
        sizes = {name: p.numel() for name, p in stage.named_parameters()}
        trained = sorted(name for name, p in stage.named_parameters() if p.requires_grad)
        frozen = sorted(sizes.keys() - set(trained))
        assert sorted(saved) == sorted(["weights", *parts[case.optimizer], *(["frozen"] if case.frozen else [])])
        for part, named in saved.items():
            assert list(named) == (frozen if part == "frozen" else trained), case
            assert {n: x.numel() for n, x in named.items()} == {n: 1 if part == "step" else sizes[n] for n in named}


def test_a_step_with_a_nan_on_one_rank_is_skipped_without_a_trace(on_two) -> None:
    """That what follows is as if it had not been, the comparison of losses and pieces shows."""
    for case, found in each(on_two):
        skipped = found["skipped"]
        assert skipped["norm"] != skipped["norm"], case
        assert skipped["said"] is False and skipped["changed"] == [], case
        assert skipped["reported"][0] == skipped["reported"][1] > 0, case


def taken_up(case: Case, start: Whole, steps: tuple[int, ...] = (2, 3)) -> dict[str, object]:
    """Two steps from what other ranks, or another engine, have saved."""
    engine = make_engine(case, 1)
    engine.restore(Gathered(start))
    same = differing(start, gather(engine.pieces()))
    losses = [float.fromhex(x) for x in train(engine, *steps)]
    engine.close()
    return {"taken up": same, "losses": losses}


def all_taken_up(starts: dict[Case, Whole]) -> list[dict]:
    return [taken_up(case, start) for case, start in starts.items()]


@pytest.mark.parametrize(("ranks", "cases"), [(1, CASES[3:]), (3, CASES[1::2])])
def test_other_numbers_of_ranks_take_up_what_two_have_saved(ranks: int, cases: list[Case], run_ranks, on_two) -> None:
    """3 ranks divide few tensors evenly, and the temperature not at all."""
    saved = {case: found for case, found in zip(CASES, on_two[0], strict=True) if case in cases}
    for results in run_ranks(ranks, all_taken_up, {case: found["saved"] for case, found in saved.items()}):
        for (case, before), found in zip(saved.items(), results, strict=True):
            assert found["taken up"] == [], case
            # Sums of gradients in another order; bf16 rounds each of them at 0.4 %.
            expected = [float.fromhex(x) for x in before["losses"][0]]
            assert found["losses"] == pytest.approx(expected, rel=1e-5 if case.precision == "fp32" else 0.02), case


def change_of_engine(case: Case) -> dict[str, object]:
    engine = make_engine(case, 0, DeepSpeedEngine)
    train(engine, 0, 1)
    saved = gather(engine.pieces())
    # In step 2 the image tower has no gradient: to ZeRO one of zero, with which Adam goes on, to torch none.
    expected = [float.fromhex(x) for x in train(engine, 3, 4)]
    engine.close()
    return {**taken_up(case, saved, (3, 4)), "expected": expected}


def test_torch_takes_up_what_deepspeed_has_saved(run_ranks) -> None:
    found = run_ranks(2, change_of_engine, Case(3, "fp32"))[0]
    assert found["taken up"] == []
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)


def refusal(case: Case) -> list[str]:
    engine = make_engine(case, seed=0)
    whole = gather(engine.pieces())
    whole["weights"]["encoder.visual.strange"] = whole["weights"].pop("encoder.visual.stem.weight")
    other = Gathered(gather(make_engine(Case(0, "fp32", frozen=True), seed=0).pieces()))
    found = []
    for saved in (Gathered(whole), other):
        try:
            engine.restore(saved)
        except UserError as error:
            found.append(str(error))
    engine.close()
    return found


def test_a_checkpoint_of_another_stage_is_refused_by_name(run_ranks) -> None:
    missing, frozen = run_ranks(2, refusal, Case(3, "fp32"))[0]
    assert "encoder.visual.stem.weight is among the weights of the stage and not of the checkpoint" in missing
    assert "is among the" in frozen and "visual" in frozen and "resume with the configuration" in frozen
