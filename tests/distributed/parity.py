"""N ranks under the engine beside one plain process on the concatenated batch."""

from collections.abc import Callable

import pytest
import torch

from reid_dist.config import EngineConfig, OptimizerConfig
from reid_dist.distributed import mean_over_ranks, rank, world_size
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages.base import Stage

GLOBAL_BATCH = 16
IDENTITIES = 8
STEPS = 3
SGD = OptimizerConfig(
    name="sgd", lr=0.02, momentum=0.9, weight_decay=0.01, bias_lr_multiplier=2.0, new_lr_multiplier=3.0
)
TOLERANCE = 1e-5
Batch = dict[str, torch.Tensor]


def make_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    pid = torch.randint(0, IDENTITIES // 2, (GLOBAL_BATCH,), generator=generator)
    token = torch.randint(3, 400, (GLOBAL_BATCH, 40), generator=generator)
    lengths = torch.randint(5, 39, (GLOBAL_BATCH,), generator=generator)
    token[torch.arange(40)[None, :] > lengths[:, None]] = 0
    token[torch.arange(GLOBAL_BATCH), lengths] = 511
    return {
        "image_BCHW": torch.randint(0, 256, (GLOBAL_BATCH, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": pid,
        "camid_B": torch.zeros(GLOBAL_BATCH, dtype=torch.int64),
        "sample_id_B": torch.arange(GLOBAL_BATCH),
    }


def of_this_rank(batch: Batch) -> Batch:
    """Its share of the rows of the images, and of the rows of the text, which may be fewer."""
    return {name: x[len(x) // world_size() * rank() :][: len(x) // world_size()] for name, x in batch.items()}


def reference(
    make_stage: Callable[[], Stage], optimizer_config: OptimizerConfig, batches: Callable[[int], Batch] = make_batch
) -> dict:
    """A plain torch loop in one process: no engine, no process group, the whole batch."""
    stage = make_stage().train()
    optimizer = build_optimizer(parameter_groups(stage.trainable(), optimizer_config), optimizer_config)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = stage(batches(step))["loss"]
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in stage.named_parameters() if p.requires_grad}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients, "parameters": dict(stage.state_dict())}


def train(
    make_stage: Callable[[], Stage],
    zero_stage: int,
    optimizer_config: OptimizerConfig,
    batches: Callable[[int], Batch] = make_batch,
) -> dict:
    """The same under DeepSpeed on this rank's rows."""
    stage = make_stage().train()
    rows = GLOBAL_BATCH // world_size()
    engine = DeepSpeedEngine(stage, EngineConfig(zero_stage=zero_stage), optimizer_config, rows)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = engine(of_this_rank(batches(step)))["loss"]
        engine.backward(loss)
        if step == 0:
            gradients = engine.full_gradients()
        assert engine.step()
        losses.append(mean_over_ranks(loss).item())
    parameters = engine.full_parameters()
    engine.close()
    return {"losses": losses, "gradients": gradients, "parameters": parameters} if rank() == 0 else {}


def assert_equal(found: dict, expected: dict, what: str, zero: frozenset | set = frozenset()) -> None:
    """Losses, gradients and parameters; `zero` are gradients that are zero in theory."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE), what
    assert_close(found["gradients"], expected["gradients"], f"{what} gradient of", zero)
    # What began at zero and was moved by rounding alone still is no more than that.
    still = {name for name in zero if expected["parameters"][name].norm() < 1e-6}
    assert_close(found["parameters"], expected["parameters"], f"{what} value of", still)


def assert_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str, zero: frozenset | set = frozenset()
) -> None:
    assert set(ours) == set(theirs), what
    whole = float(torch.stack([value.double().norm() for value in theirs.values()]).norm())
    for name, value in theirs.items():
        if name in zero:
            assert max(ours[name].norm(), value.norm()) < 1e-6 * whole, f"{what} {name} is not zero"
            continue
        if torch.equal(ours[name], value):  # also what is zero, such as biases that a frozen tower never moved
            continue
        error = (ours[name].double() - value.double()).norm() / value.double().norm()
        assert error < TOLERANCE, f"{what} {name}: relative error {error:.2e}"
