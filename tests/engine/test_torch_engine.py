"""torch's engine by itself: precision, clipping, accumulation, the temperature's clamp, what the ranks share out."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from reid_dist.config import EngineConfig
from reid_dist.engine.torch_engine import TorchEngine
from reid_dist.errors import UserError
from tests.distributed.parity import of_this_rank
from tests.engine.test_deepspeed_engine import ADAMW, SGD, WANTED, make_batch, make_stage

ZERO_STAGES = (0, 1, 3)  # 2 groups as 3 does and releases as 1 does


def test_what_only_deepspeed_has_is_refused() -> None:
    with pytest.raises(ValueError, match="raw keys are DeepSpeed's, and backend is torch; remove one"):
        EngineConfig(backend="torch", deepspeed={"wall_clock_breakdown": True})
    with pytest.raises(ValueError, match="pure_bf16 has no fp32 masters with backend torch; choose bf16 or fp32"):
        EngineConfig(backend="torch", precision="pure_bf16")


def make_engine(zero_stage: int, optimizer=SGD, freeze=(), **settings) -> TorchEngine:
    config = EngineConfig(backend="torch", zero_stage=zero_stage, **settings)
    return TorchEngine(make_stage(freeze).train(), config, optimizer, 8)


def whole_weights(engine: TorchEngine) -> torch.Tensor:
    names = [name for name, _ in engine.stage.named_parameters()]
    found = engine.full_parameters(names)
    return torch.cat([found[name].flatten() for name in names])


def losses_in_bf16(zero_stage: int) -> list[float]:
    engine = make_engine(zero_stage, ADAMW, precision="bf16")
    found = []
    for _ in range(3):
        output = engine(of_this_rank(make_batch()))
        engine.backward(output["loss"])
        assert engine.step()
        found.append(float(output["loss"].detach()))
    masters = {tensor.dtype for _, tensor in engine.exact_parameters()}
    engine.close()
    assert masters == {torch.float32}
    return found


def clamped(zero_stage: int) -> tuple[float, float]:
    """The temperature pushed upwards by its gradient: as exported, and as the next forward uses it."""
    stage = make_stage().train()
    stage.encoder.logit_scale.data.fill_(4.60)
    engine = TorchEngine(stage, EngineConfig(backend="torch", zero_stage=zero_stage), SGD, 8)
    for _ in range(3):
        output = engine(of_this_rank(make_batch()))
        engine.backward(-output["metrics"]["logit_scale"].sum() + 0 * output["loss"])
        engine.step()
    used = float(engine(of_this_rank(make_batch()))["metrics"]["logit_scale"].detach())
    exported = float(engine.full_parameters(["encoder.logit_scale"])["encoder.logit_scale"])
    engine.close()
    return exported, used


def norm_and_step(zero_stage: int, limit: float) -> dict[str, object]:
    """Gradients and their norm before clipping, and how far one SGD step of lr 0.1 moved all weights."""
    engine = make_engine(zero_stage, max_grad_norm=limit)
    before = whole_weights(engine)
    engine.backward(engine(of_this_rank(make_batch()))["loss"])
    assert engine.gradient_norm() == 0
    gradients = engine.full_gradients()
    engine.step()
    moved = float((whole_weights(engine) - before).norm())
    engine.close()
    return {"gradients": gradients, "norm": engine.gradient_norm(), "moved": moved}


def accumulated(zero_stage: int) -> tuple[list[bool], torch.Tensor]:
    """Two micro-batches, each contrasted within itself; returns what `step` said and one weight."""
    engine = make_engine(zero_stage, gradient_accumulation_steps=2)
    said = []
    for seed in range(2):
        engine.backward(engine(of_this_rank(make_batch(seed=seed)))["loss"])
        said.append(engine.step())
    weight = engine.full_parameters(["encoder.visual.stem.weight"])["encoder.visual.stem.weight"]
    engine.close()
    return said, weight


def broadcast(zero_stage: int) -> bool:
    """Whether ranks that began with different weights hold rank 0's."""
    stage = make_stage().train()
    expected = stage.encoder.visual.stem.weight.detach().clone()
    stage.encoder.visual.stem.weight.data += dist.get_rank()
    engine = TorchEngine(stage, EngineConfig(backend="torch", zero_stage=zero_stage), SGD, 8)
    found = engine.full_parameters(["encoder.visual.stem.weight"])["encoder.visual.stem.weight"]
    engine.close()
    return found.equal(expected)


def kept_whole(zero_stage: int) -> dict[str, int]:
    """Elements that this rank holds between two steps, by what trains and what does not."""
    engine = make_engine(zero_stage, ADAMW, freeze=("visual",))
    engine.backward(engine(of_this_rank(make_batch()))["loss"])
    engine.step()
    held = {"trained": 0, "frozen": 0, "moments": 0}
    for parameter in engine.stage.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held["trained" if parameter.requires_grad else "frozen"] += own.numel()
        moment = engine._optimizer.state.get(parameter, {}).get("exp_avg", torch.empty(0))
        held["moments"] += (moment.to_local() if isinstance(moment, DTensor) else moment).numel()
    engine.close()
    return held


def exact(zero_stage: int) -> dict[str, object]:
    stage = make_stage().train()
    stage.register_buffer("counter", torch.arange(3))
    stage.register_buffer("scratch", torch.zeros(1), persistent=False)
    engine = TorchEngine(stage, EngineConfig(backend="torch", zero_stage=zero_stage), ADAMW, 8)
    before = engine.full_parameters()
    engine(of_this_rank(make_batch()))
    found = dict(engine.exact_parameters())
    copies = engine.full_parameters(WANTED)
    copies["counter"] += 1
    try:
        refusal = str(next(engine.exact_parameters([*WANTED, "scratch", "encoder.visual.sten"])))
    except ValueError as error:
        refusal = str(error)
    engine.close()
    return {
        "names": list(found) == [name for name, _ in stage.named_parameters()] + ["counter"],
        "changed": [name for name, x in before.items() if not x.equal(found[name])],
        "with gradient": [name for name, tensor in found.items() if tensor.requires_grad],
        "asked for": {name for name, _ in engine.exact_parameters(iter(WANTED))} == {*copies} == {*WANTED},
        "counter": stage.counter.tolist(),
        "refusal": refusal,
    }


def groups(zero_stage: int) -> tuple[float, list[tuple[float, float]], bool]:
    engine = make_engine(zero_stage, ADAMW)
    engine.set_learning_rate(0.5)
    names = sorted(name for group in engine.groups for name in group["names"])
    found = [(group["lr"], group["weight_decay"]) for group in engine.groups]
    engine.close()
    return engine.learning_rate, found, names == sorted(name for name, _ in engine.stage.named_parameters())


def nothing_trains(zero_stage: int) -> str:
    stage = make_stage()
    stage.requires_grad_(False)
    with pytest.raises(UserError) as error:
        TorchEngine(stage, EngineConfig(backend="torch", zero_stage=zero_stage), SGD, 8)
    return str(error.value)


def all_of_them() -> dict[str, list]:
    found = {"free": [norm_and_step(zero, 0.0) for zero in ZERO_STAGES]}
    found["clipped"] = [norm_and_step(zero, 0.5) for zero in ZERO_STAGES]
    for look in (losses_in_bf16, clamped, accumulated, broadcast, kept_whole, exact, groups, nothing_trains):
        found[look.__name__] = [look(zero) for zero in ZERO_STAGES]
    return found


@pytest.fixture(scope="module")
def ranks(run_ranks) -> list[dict[str, list]]:
    """What each of two ranks found, for every ZeRO stage."""
    return run_ranks(2, all_of_them)


@pytest.fixture
def found(ranks) -> dict[str, list]:
    return ranks[0]


def test_bf16_learns_over_fp32_weights(found) -> None:
    for losses in found["losses_in_bf16"]:
        assert losses[-1] < 0.8 * losses[0]
        # bf16 rounds at 0.4 %.
        assert losses == pytest.approx(found["losses_in_bf16"][0], abs=0.05)


def test_the_temperature_is_clamped(found) -> None:
    for exported, used in found["clamped"]:
        assert exported == pytest.approx(math.log(100), abs=1e-6)
        assert used == pytest.approx(100.0, abs=1e-3)


def test_clipping_bounds_the_step_and_not_the_reported_norm(found) -> None:
    for free, clipped in zip(found["free"], found["clipped"], strict=True):
        assert clipped["norm"] == pytest.approx(free["norm"], rel=1e-5) and clipped["norm"] > 0.5
        assert free["moved"] == pytest.approx(0.1 * free["norm"], rel=1e-3)
        assert clipped["moved"] == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_what_the_ranks_share_out_changes_no_bit_of_a_gradient(found) -> None:
    whole = found["free"][0]["gradients"]
    for shared in found["free"][1:]:
        assert shared["gradients"].keys() == whole.keys()
        assert all(x.equal(whole[name]) for name, x in shared["gradients"].items())


def test_accumulation_averages_the_gradients_of_its_micro_batches(found) -> None:
    stage = make_stage().train()
    (sum(stage(make_batch(seed=seed))["loss"] for seed in range(2)) / 2).backward()
    expected = stage.encoder.visual.stem.weight.detach() - 0.1 * stage.encoder.visual.stem.weight.grad
    for said, weight in found["accumulated"]:
        assert said == [False, True]
        assert torch.allclose(weight, expected, atol=1e-6)


def test_all_ranks_begin_with_the_weights_of_rank_0(ranks) -> None:
    assert [found["broadcast"] for found in ranks] == [[True] * len(ZERO_STAGES)] * 2


def test_the_ranks_share_out_what_the_zero_stage_says(ranks) -> None:
    stage = make_stage(("visual",))
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in stage.parameters() if not p.requires_grad)
    of_ranks = list(zip(*(found["kept_whole"] for found in ranks), strict=True))
    assert of_ranks[0] == ({"trained": trained, "frozen": frozen, "moments": trained},) * 2
    for zero_stage in ZERO_STAGES[1:]:
        for what, elements in (("trained", trained), ("moments", trained), ("frozen", frozen)):
            held = [own[what] for own in of_ranks[ZERO_STAGES.index(zero_stage)]]
            if what == "frozen" and zero_stage < 3:
                assert held == [frozen, frozen]
            else:
                assert sum(held) == elements and max(held) < 0.6 * elements


def test_exact_parameters_are_whole_and_named(found) -> None:
    for of in found["exact"]:
        refusal = of.pop("refusal")
        assert "has no encoder.visual.sten, scratch" in refusal
        assert of == {"names": True, "changed": [], "with gradient": [], "asked for": True, "counter": [0, 1, 2]}


def test_groups_name_all_parameters_and_follow_the_schedule(found) -> None:
    for rate, settings, complete in found["groups"]:
        assert rate == 0.5e-3 and complete
        assert sorted(settings) == [(0.5e-3, 0.0), (0.5e-3, 0.02)]


def test_a_stage_without_anything_to_train_is_refused(found) -> None:
    assert found["nothing_trains"] == ["freeze: nothing in this stage trains; unfreeze a tower"] * len(ZERO_STAGES)
