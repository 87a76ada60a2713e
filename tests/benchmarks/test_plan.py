"""`benchmark.py plan`: a prediction beside a measurement."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist.benchmarks import plan
from reid_dist.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
RATES = {
    "fp32_tflops": 0.05,
    "bf16_tflops": 0.01,
    "memory_gbs": 10.0,
    "operation_us": 5.0,
    "near_us": 50.0,
    "near_gbs": 1.0,
    "far_us": 50.0,
    "far_gbs": 1.0,
}


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args([CONFIG, "--json", "x.json", *options])


def rates_of_a_rank() -> torch.Tensor:
    found = plan.Machine(torch.device("cpu"), 2).rates()
    return torch.tensor([found[name] for name in RATES])


def test_rates_are_the_slowest_ranks(run_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PRODUCT", "_COPIED", "_REDUCED"):
        monkeypatch.setattr(plan, name, 256)
    one, other = run_ranks(2, rates_of_a_rank)
    assert torch.equal(one, other) and (one > 0).all()


def test_rows() -> None:
    cases = plan.choose_cases(parsed("--stage", "pretrain", "--ranks", "2", "1"))
    assert [case.trained.ranks for case in cases] == [1, 2]  # one rank first: the others are carried from it
    measured = [{"rates": RATES, "measured_ms": ms, "threads": 1} for ms in (400.0, 300.0)]
    one, two = plan.compared(cases, measured)
    beside = two["update_ms"] + two["exchange_ms"]
    assert one["predicted_ms"] == pytest.approx(one["compute_ms"] + one["update_ms"], abs=0.01)
    assert one["exchange_ms"] == 0 < two["exchange_ms"] and "carried_ms" not in one
    stretch = (400 - one["update_ms"]) / one["compute_ms"]
    assert two["carried_ms"] == pytest.approx(beside + two["compute_ms"] * stretch, rel=1e-3)
    assert (one["measured_samples_per_s"], two["measured_samples_per_s"]) == (160.0, 213.3)
    text = plan.table([one, two])
    assert "fp32_tflops=0.05" in text and len(text.splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be above 0"),
        (["--steps", "0"], "--steps 0: must be above 0"),
        (["--zero", "4"], "zero_stage"),
        (["--zero", "3"], "momentum encoders"),
        (["--stage", "i3i"], "--stage i3i: the recipe has"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.run(parsed(*options))
