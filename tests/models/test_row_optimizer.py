"""Rows of a matrix beside torch's optimizers: of the whole matrix, and of each row by itself."""

import pytest
import torch
from torch import Tensor

from reid_dist.models.row_optimizer import RowOptimizer

SETTINGS = [
    RowOptimizer("adamw", 0.01, 0.1, (0.8, 0.95), 1e-6),
    RowOptimizer("adam", 0.01, 0.1, (0.8, 0.95), 1e-6),
    RowOptimizer("adam", 0.01, 0.0),
    RowOptimizer("sgd", 0.01, 0.1, momentum=0.7),
    RowOptimizer("sgd", 0.01, 0.0, momentum=0.0),
]
ROWS, COLUMNS = 5, 3


def torch_optimizer(setting: RowOptimizer, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if setting.name == "sgd":
        return torch.optim.SGD(parameters, setting.lr, setting.momentum, weight_decay=setting.weight_decay)
    kind = torch.optim.Adam if setting.name == "adam" else torch.optim.AdamW
    return kind(parameters, setting.lr, setting.betas, setting.eps, setting.weight_decay)


def start(setting: RowOptimizer) -> tuple[Tensor, list[Tensor], Tensor]:
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return weight, [torch.zeros_like(weight) for _ in range(setting.moments)], torch.zeros(ROWS, dtype=torch.int32)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.name}-{s.weight_decay}")
def test_all_rows_in_every_step_are_torch_s_optimizer(setting: RowOptimizer) -> None:
    weight, moments, steps = start(setting)
    reference = weight.clone().requires_grad_()
    optimizer = torch_optimizer(setting, [reference])
    generator = torch.Generator().manual_seed(1)
    for factor in (1.0, 0.5, 0.25, 2.0):
        gradient = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
        reference.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = setting.lr * factor
        optimizer.step()
        setting.update(weight, gradient, moments, steps, factor)
    torch.testing.assert_close(weight, reference.detach(), rtol=1e-12, atol=1e-14)
    assert steps.tolist() == [4] * ROWS


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.name}-{s.weight_decay}")
def test_a_row_is_trained_as_if_only_its_own_steps_had_been(setting: RowOptimizer) -> None:
    weight, moments, steps = start(setting)
    rows = [row.clone().requires_grad_() for row in weight]
    optimizers = [torch_optimizer(setting, [row]) for row in rows]
    generator = torch.Generator().manual_seed(2)
    for index in ([0, 3], [3], [1, 3, 4], [0]):
        gradient = torch.randn(len(index), COLUMNS, dtype=torch.float64, generator=generator)
        for place, row in enumerate(index):
            rows[row].grad = gradient[place].clone()
            optimizers[row].step()
        taken = [x[index] for x in (weight, *moments, steps)]
        setting.update(taken[0], gradient, taken[1:-1], taken[-1], 1.0)
        for x, block in zip((weight, *moments, steps), taken, strict=True):
            x[index] = block
    torch.testing.assert_close(weight, torch.stack(rows).detach(), rtol=1e-12, atol=1e-14)
    assert steps.tolist() == [2, 1, 0, 3, 1]
