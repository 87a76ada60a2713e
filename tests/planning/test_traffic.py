"""The messages that a plan expects beside those that DeepSpeed's ranks really send."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from reid_dist.config import RunConfig, StageConfig
from reid_dist.distributed import all_gather, all_gather_with_grad, all_to_all, start_all_gather, sum_over_ranks
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.optim import parameter_groups
from reid_dist.planning.building import pretended_ranks
from reid_dist.planning.estimate import count_step
from reid_dist.planning.links import Links
from reid_dist.planning.traffic import Exchange, Listening, engine_exchanges, parameter_sizes
from tests.test_step_memory import real_batch, real_stage, stage_of

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

RANKS, ROWS = 2, 4
MODES = [
    (zero, precision) for zero in range(4) for precision in ("fp32", "bf16", "pure_bf16") if zero or precision[0] != "p"
]


def case(name: str, zero: int, precision: str, micro: int = 1) -> tuple[RunConfig, StageConfig]:
    changes = (f"engine.zero_stage={zero}", f"engine.precision={precision}")
    changes += (f"engine.gradient_accumulation_steps={micro}", f"data.global_batch_size={RANKS * ROWS * micro}")
    return stage_of("quickstart", name, ROWS, RANKS, *changes)


def heard_in_a_step(cases: list[tuple[str, int, str, int]]) -> Tensor:
    """Bytes by (case; all that is sent, of it in all-reduces) of the second optimizer step of a real engine."""
    found = []
    for name, zero, precision, micro in cases:
        config, stage = case(name, zero, precision, micro)
        module = real_stage(config, stage, ROWS)
        engine = DeepSpeedEngine(module, stage.engine, stage.optimizer, ROWS)
        module.start(engine.exact_parameters)
        for _ in range(2):
            with Listening() as heard:
                states, updated = [], False
                for _ in range(micro):
                    output = engine(real_batch(module, ROWS, config.model.image_size, False))
                    engine.backward(output["loss"])
                    updated = engine.step()
                    states.append(output["state"])
                module.after_step(states, updated, engine.exact_parameters)
        engine.close()
        sent = Counter({1: 0, 2: 0})
        for exchange in heard.found:
            sent[exchange.rounds] += round(exchange.sent_bytes(RANKS))
        found.append([sent[1], sent[2]])
    return torch.tensor(found)


def planned(name: str, zero: int, precision: str, micro: int) -> list[float]:
    config, stage = case(name, zero, precision, micro)
    counted = count_step(config, stage, RANKS)
    losses = [(x.sent_bytes(RANKS) * micro, x.rounds) for x in counted.heard]
    own = [(x.sent_bytes(RANKS), x.rounds) for x in engine_exchanges(counted.sizes, stage.engine, *counted.averaged)]
    return [sum(sent for sent, rounds in (*losses, *own) if rounds == wanted) for wanted in (1, 2)]


FEW = [("pretrain", 0, "fp32", 1), ("pretrain", 1, "bf16", 2), ("pretrain", 3, "bf16", 2), ("t2i", 2, "pure_bf16", 1)]
MANY = [("pretrain", zero, precision, 1) for zero, precision in MODES]
MANY += [("pretrain", 2, "bf16", 2), ("pretrain", 3, "fp32", 2), ("t2i", 1, "fp32", 1), ("i2i", 0, "fp32", 1)]


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"])
def test_a_plan_expects_what_deepspeed_sends(cases: list[tuple[str, int, str, int]], run_ranks) -> None:
    real = run_ranks(RANKS, heard_in_a_step, cases)
    assert torch.equal(real[0], real[1])
    for number, one in enumerate(cases):
        # A few numbers more: padding, norms, flags of overflow.
        assert planned(*one) == pytest.approx(real[0][number].tolist(), rel=0.002, abs=64), one


def every_collective(x: Tensor) -> None:
    all_gather(x)
    all_gather_with_grad(x.requires_grad_()).sum().backward()
    sum_over_ranks(x)
    start_all_gather([x, x.detach().byte()]).wait()
    all_to_all(x)


def test_a_rank_of_many_that_do_not_exist_hears_its_collectives() -> None:
    with pretended_ranks(16), Listening() as heard:
        every_collective(torch.zeros(32, 3))
    whole = 16 * 32 * 3 * 4
    packed = 16 * (32 * 3 * 4 + 32 * 3)
    expected = [(whole, 1), (whole, 1), (whole, 2), (whole / 16, 2), (packed, 1), (whole / 16, 1)]
    assert [(x.whole_bytes, x.rounds) for x in heard.found] == expected


def test_time_of_an_exchange_by_hand() -> None:
    links = Links(node=4, near_us=1.0, far_us=100.0, near_gbs=10.0, far_gbs=1.0)
    reduced = Exchange("gradients", 8e6, calls=3, rounds=2)
    assert reduced.sent_bytes(4) == 2 * 8e6 * 3 / 4
    assert reduced.seconds(4, links) == pytest.approx(3 * 2 * 2 * 1e-6 + 12e6 / 10e9)
    assert reduced.seconds(8, links) == pytest.approx(3 * 2 * 3 * 1e-4 + 14e6 / 1e9)
    assert reduced.seconds(1, links) == 0


def test_sizes_of_the_quickstart() -> None:
    config, stage = case("i2i", 1, "bf16")
    module = real_stage(config, stage, ROWS)
    groups = parameter_groups(module.trainable(), stage.optimizer)
    sizes = parameter_sizes(module, len(groups))
    assert sizes.trainable == sum(p.numel() for group in groups for p in group["params"])
    assert sizes.trainable + sizes.frozen == sum(p.numel() for p in module.parameters())
    assert 0 < sizes.narrow < sizes.trainable and sizes.persistent + sizes.gathered <= sizes.trainable + sizes.frozen
