"""Where DeepSpeed keeps gradients: none is left behind by a step, made or skipped."""

import pytest

from reid_dist.config import EngineConfig
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.errors import UserError
from tests.engine.zero_cases import OPTIMIZERS, ROWS, Case, backward, make_engine, make_stage, train

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

STILL = [Case(zero, "fp32", "plain sgd") for zero in (0, 1, 2, 3)]
STILL += [Case(zero, "pure_bf16", "plain sgd", wide=True) for zero in (1, 2)]


def moved_without_gradient(case: Case) -> dict[str, list[str]]:
    """Image tower's weights that move in a step of the text alone: after one with images, and after a skipped one."""
    engine = make_engine(case, seed=0)
    found = {}
    for kind in ("made", "skipped"):
        if kind == "made":
            train(engine, 0)
        else:
            backward(engine, 0, 0, float("nan"))
            assert not engine.step(skip=True)
        before = engine.full_parameters()
        train(engine, 2)
        after = engine.full_parameters()
        found[kind] = [name for name in before if "visual" in name and not after[name].equal(before[name])]
        assert not after["encoder.text.token_embedding.weight"].equal(before["encoder.text.token_embedding.weight"])
    engine.close()
    return found


def all_moved_without_gradient() -> list[dict[str, list[str]]]:
    return [moved_without_gradient(case) for case in STILL]


def test_a_gradient_moves_a_weight_in_its_own_step_alone(run_ranks) -> None:
    """DeepSpeed keeps shards of gradients at ZeRO 3, those of a skipped step too, and uses them where none came."""
    for case, found in zip(STILL, run_ranks(1, all_moved_without_gradient)[0], strict=True):
        assert found == {"made": [], "skipped": []}, case


@pytest.mark.parametrize(
    "raw",
    [{"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "nvme"}}, {"round_robin_gradients": True}],
)
def test_what_moves_the_state_to_where_it_is_not_looked_for_is_refused(raw: dict) -> None:
    config = EngineConfig(zero_stage=3, deepspeed={"zero_optimization": raw})
    with pytest.raises(UserError, match=rf"engine\.deepspeed\.zero_optimization\.{next(iter(raw))}: .*remove the key"):
        DeepSpeedEngine(make_stage(0, frozen=False), config, OPTIMIZERS["adam"], ROWS)
