"""torch's DDP and FSDP2 beside DeepSpeed's ZeRO 0-3 on two ranks: the same losses, gradients and weights in fp32.

DeepSpeed's are held against one plain process in tests/distributed.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.config import EngineConfig, I2ILoss, ModelConfig, OptimizerConfig, TextLoss
from reid_dist.distributed import mean_over_ranks, rank, world_size
from reid_dist.engine import build_engine
from reid_dist.engine.base import Engine
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.base import Stage
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.contract import Batch, State, Surroundings
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.t2i import T2IStage
from tests.distributed import test_method_parity as methods
from tests.distributed.parity import GLOBAL_BATCH, IDENTITIES, SGD

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

TOLERANCE = 1e-6
STEPS = 2
ADAMW = OptimizerConfig(name="adamw", lr=1e-3)
QUEUE = TextLoss(queue_size=40, momentum=0.5, in_batch_negatives=True)
MODELS = Path(__file__).parents[2] / "configs" / "models"


@dataclass(frozen=True)
class Case:
    """A stage by its name, and how it trains."""

    name: str
    zero_stage: int
    accumulation: int = 1
    cached: bool = False
    clip: float = 0.0
    optimizer: OptimizerConfig = SGD


CASES = [
    Case("queue", 0, accumulation=2, clip=0.5),
    Case("queue", 2, accumulation=2, cached=True),
    Case("conflict", 2),
    Case("frozen", 0, accumulation=2, clip=0.5, optimizer=ADAMW),
    Case("frozen", 3, accumulation=2, clip=0.5, optimizer=ADAMW),
    Case("irra", 3),
    Case("joint_dual_token", 1),
]


def make_stage(case: Case, vocabulary: Path) -> Stage:
    if case.name not in ("queue", "conflict", "frozen"):
        return methods.make_stage(case.name, vocabulary)
    torch.manual_seed(1)
    architecture = MODELS / ("row_conv_tiny.json" if case.name == "queue" else "vit_tiny.json")
    encoder = build_dual_encoder(ModelConfig(architecture=str(architecture), image_size=(64, 32)))
    run = Surroundings(GLOBAL_BATCH // 2 // case.accumulation, identities=IDENTITIES)
    if case.name == "queue":
        return T2IStage(encoder, QUEUE, run=run)
    if case.name == "frozen":
        return T2IStage(encoder, TextLoss(), ("visual",), run)
    return I2IStage(encoder, I2ILoss(text_weight=0.5, conflict_every=1), run=run)


def own_rows(case: Case, step: int) -> list[Batch]:
    """This rank's micro-batches of a step."""
    batch = methods.batches(case.name, step)
    parts = case.accumulation * world_size()
    return [
        {name: x[len(x) // parts * part :][: len(x) // parts] for name, x in batch.items()}
        for part in range(rank(), parts, world_size())
    ]


def accumulated(engine: Engine, batches: list[Batch], seen: dict[str, Any]) -> tuple[list[State], bool]:
    """As the trainer does it; `seen` gets the losses, and the first step's gradients."""
    states, updated = [], False
    for batch in batches:
        output = engine(batch)
        engine.backward(output["loss"])
        look(engine, batch is batches[-1], seen)
        updated = engine.step()
        seen["losses"].append(float(mean_over_ranks(output["loss"])))
        seen["metrics"].append({name: x.detach() for name, x in output["metrics"].items() if "conflict" in name})
        states.append(output["state"])
    return states, updated


def cached(engine: Engine, batches: list[Batch], seen: dict[str, Any]) -> tuple[list[State], bool]:
    """With the loss of all micro-batches together."""
    stage, updated = engine.stage, False
    passes = [engine.run(partial(first_pass, stage), batch) for batch in batches]
    joint = engine.run(lambda _: joint_gradients(stage, batches, passes), {})
    for index, (batch, first) in enumerate(zip(batches, passes, strict=True)):
        engine.backward(engine.run(partial(surrogate, stage, first=first, cached=joint, index=index), batch))
        look(engine, index == len(batches) - 1, seen)
        updated = engine.step()
    seen["losses"].append(float(mean_over_ranks(joint.loss)))
    return [first.state for first in passes], updated


def look(engine: Engine, last: bool, seen: dict[str, Any]) -> None:
    if last and "gradients" not in seen:
        seen["gradients"], seen["norm"] = engine.full_gradients(), float(engine.pending_norm())


def train(case: Case, backend: str, vocabulary: Path) -> dict[str, Any]:
    stage = make_stage(case, vocabulary).train()
    config = EngineConfig(
        backend=backend,
        zero_stage=case.zero_stage,
        gradient_accumulation_steps=case.accumulation,
        cached_gradients=case.cached,
        max_grad_norm=case.clip,
    )
    engine = build_engine(stage, config, case.optimizer, GLOBAL_BATCH // 2 // case.accumulation)
    stage.start(engine.exact_parameters)
    seen: dict[str, Any] = {"losses": [], "metrics": []}
    for step in range(STEPS):
        run_step = cached if case.cached else accumulated
        states, updated = run_step(engine, stage.prepare(own_rows(case, step)), seen)
        assert updated
        stage.after_step(states, updated, engine.exact_parameters)
    seen |= {"parameters": engine.full_parameters(), "last norm": engine.gradient_norm()}
    keys = {} if stage.moco is None else {name: x.clone() for name, x in stage.moco.key_encoder.state().items()}
    queue = None if stage.moco is None else stage.moco.queue.ring.image_XD.clone()
    seen |= {"keys": keys, "queue": queue}
    engine.close()
    return seen


def train_all(vocabulary: Path) -> list[dict[str, dict]]:
    return [{backend: train(case, backend, vocabulary) for backend in ("torch", "deepspeed")} for case in CASES]


def length(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([x.double().norm() for x in tensors.values()]).norm())


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative norm of the difference."""
    assert ours.keys() == theirs.keys()
    return length({name: ours[name].double() - x for name, x in theirs.items()}) / length(theirs)


@pytest.fixture(scope="module")
def found(run_ranks, deepspeed_imported, tmp_path_factory) -> list[dict[str, dict]]:
    vocabulary = tmp_path_factory.mktemp("words") / "vocabulary.txt"
    vocabulary.write_text("".join(f"word{number}\n" for number in range(80)))
    return run_ranks(2, train_all, vocabulary)[0]


def name_of(index: int) -> str:
    return f"{CASES[index].name}-{CASES[index].zero_stage}"


@pytest.mark.parametrize("index", range(len(CASES)), ids=name_of)
def test_losses_gradients_and_weights_are_deepspeeds(index: int, found) -> None:
    ours, theirs = found[index]["torch"], found[index]["deepspeed"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=TOLERANCE)
    assert length(theirs["gradients"]) > 0.1
    assert difference(ours["gradients"], theirs["gradients"]) < TOLERANCE
    # Adam divides a gradient that is all but zero by its own size.
    assert difference(ours["parameters"], theirs["parameters"]) < (
        1e-5 if CASES[index].optimizer == ADAMW else TOLERANCE
    )
    # ZeRO adds up the norm of parts in another order.
    assert [ours["norm"], ours["last norm"]] == pytest.approx([theirs["norm"], theirs["last norm"]], rel=1e-5)
    assert ours["norm"] == pytest.approx(length(ours["gradients"]), rel=1e-5)


def test_key_encoders_and_queue_are_deepspeeds(found) -> None:
    for case, of in zip(CASES, found, strict=True):
        ours, theirs = of["torch"], of["deepspeed"]
        assert bool(ours["keys"]) == (ours["queue"] is not None) == (case.name == "queue")
        if case.name == "queue":
            assert difference(ours["keys"], theirs["keys"]) < TOLERANCE
            assert torch.allclose(ours["queue"], theirs["queue"], atol=1e-5)


def test_gradient_cosines_are_deepspeeds(found) -> None:
    for case, of in zip(CASES, found, strict=True):
        ours, theirs = of["torch"]["metrics"], of["deepspeed"]["metrics"]
        assert any(ours) == (case.name == "conflict")
        for a, b in zip(ours, theirs, strict=True):
            assert {name: float(x) for name, x in a.items()} == pytest.approx({name: float(x) for name, x in b.items()})
