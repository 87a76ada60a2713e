"""`benchmark.py step`: its turns, its rows on real ranks and its refusals."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist.benchmarks import step
from reid_dist.benchmarks.loops import EngineLoop, Loop, TorchLoop, Trained, build_of
from reid_dist.benchmarks.step import Case, Turns
from reid_dist.errors import UserError
from reid_dist.recipe_file import load_config
from reid_dist.stages import Batch

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ROOT = Path(__file__).parents[2]


def trained(name: str, ranks: int, *overrides: str) -> Trained:
    path = ROOT / "configs" / "quickstart.yaml"
    changes = (f"model.architecture={ROOT / 'configs' / 'models' / 'row_conv_tiny.json'}", "data.root=/nowhere")
    return Trained(load_config(path, [*changes, "data.global_batch_size=8", *overrides]), name, ranks)


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return parser.parse_args(["--json", "x.json", *options])


def weights_after(name: str, steps: int) -> list[torch.Tensor]:
    """Weights of the trained stage after steps of the engine's loop, of torch's, and of torch's with DDP."""
    one = trained(name, torch.distributed.get_world_size())
    device = torch.device("cpu")
    engine = build_of(one, device)
    engine.stage.start(engine.exact_parameters)
    loops: list[Loop] = [EngineLoop(engine, device)]
    parallel, plain = TorchLoop(one, device, parallel=True), TorchLoop(one, device, parallel=False)
    batches = one.batches(engine.stage, steps)
    for batch in batches:
        for loop in (*loops, parallel, plain):
            loop.step(batch)
    stages = (engine.stage, parallel.stage, plain.stage)
    return [torch.cat([p.detach().flatten() for p in stage.parameters()]) for stage in stages]


@pytest.mark.parametrize("name", ["pretrain", "t2i"])
def test_the_loops_train_the_same(run_ranks: Callable[..., list[Any]], name: str) -> None:
    """With several ranks torch alone averages nothing; the others do the same work as the engine."""
    one, other = run_ranks(2, weights_after, name, 3)
    engine, parallel, plain = one
    assert (engine - parallel).norm() < 1e-4 * engine.norm()
    assert (engine - plain).norm() > 1e-3 * engine.norm()
    assert torch.equal(one[0], other[0]) and not torch.equal(one[2], other[2])


def rows(name: str) -> str:
    return json.dumps(step.measure(Case(trained(name, torch.distributed.get_world_size()), turns=2, steps=2)))


def encoded(name: str) -> torch.Tensor:
    return torch.tensor(list(rows(name).encode()))


def test_a_row_of_two_ranks(run_ranks: Callable[..., list[Any]]) -> None:
    row = json.loads(bytes(run_ranks(2, encoded, "pretrain")[0].tolist()).decode())
    assert (row["stage"], row["ranks"], row["rows"], row["backend"]) == ("pretrain", 2, 4, "deepspeed")
    assert set(row["ms"]) == {"trainer", "engine", "plain", "ddp"} and all(ms > 0 for ms in row["ms"].values())
    assert all(len(times) == 2 for times in row["turns"].values())
    ratios = [100 * (x / y - 1) for x, y in zip(row["turns"]["trainer"], row["turns"]["engine"], strict=True)]
    assert row["own_percent"]["median"] == pytest.approx(sum(ratios) / 2, abs=0.1)
    assert "own share" in step.table([row])


class Counting(Loop):
    def __init__(self) -> None:
        self.calls = 0

    def step(self, micro_batches: list[Batch]) -> None:
        self.calls += 1


def test_turns_go_round_and_time_all_but_their_first_step() -> None:
    case = Case(trained("pretrain", 1), turns=3, steps=5)
    others = {"engine": Counting(), "plain": Counting()}
    turns = Turns(case, dict(others), [[{}]], torch.device("cpu"))
    first = []
    given = 0
    for _ in turns.steps(0, turns.total_steps):
        first.append((others["engine"].calls, others["plain"].calls))
        given += 1
    total = step._WARM_UP + 3
    assert given == turns.total_steps == total * 6 + 1
    assert {loop.calls for loop in others.values()} == {total * 6}
    assert all(len(seconds) == total for seconds in turns.seconds.values())
    # The trainer is first in the first turn, last in the second, between the others in the third.
    assert first[0] == (0, 0) and first[6] == (12, 12) and first[12] == (12, 18)


def test_share() -> None:
    assert step.share([2.0, 3.0, 4.0], [2.0, 2.0, 2.0])["median"] == 50
    assert step.share([1.03], [1.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}


def test_cases() -> None:
    cases = step.choose_cases(parsed(str(ROOT / "configs" / "quickstart.yaml"), "--stage", "i2i", "t2i"))
    assert [(case.trained.name, case.trained.rows) for case in cases] == [
        ("i2i", 64),
        ("i2i", 32),
        ("t2i", 64),
        ("t2i", 32),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be above 0"),
        (["--turns", "0"], "--turns 0: must be above 0"),
        (["--stage", "i3i"], "--stage i3i: the recipe has pretrain, i2i, t2i"),
        (["--ranks", "3"], "global_batch_size"),
        (["--set", "engine.zero=1"], "unknown key engine.zero; did you mean zero_stage"),
        (["--set", "engine={gradient_accumulation_steps: 2, cached_gradients: true}"], "are not measured here"),
        (["--json", "/"], "--json /: is a folder"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step.run(parsed(str(ROOT / "configs" / "quickstart.yaml"), *options))
