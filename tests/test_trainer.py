"""The loop of a stage: the order of its calls, a step that the engine skips, both ways to accumulate."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.checkpoint import writer as writer_module
from reid_dist.checkpoint.reader import read_manifest
from reid_dist.checkpoint.retention import saved_steps
from reid_dist.checkpoint.snapshot import Snapshot
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.config import EngineConfig, GuardConfig, ModelConfig, OptimizerConfig, TextLoss
from reid_dist.data.bad_samples import BadSamples
from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
from reid_dist.guard import Guard
from reid_dist.metrics import StageLog
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.slow_ranks import OwnWork
from reid_dist.stages import Batch, T2IStage
from reid_dist.stages.contract import State, Surroundings, Weights
from reid_dist.supervision.agreement import StopAgreement
from reid_dist.supervision.signals import StopRequest
from reid_dist.supervision.watchdog import Watchdog
from reid_dist.trainer import Companions, train
from reid_dist.training_state import TrainingState

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ARCHITECTURE = str(Path(__file__).parents[1] / "configs" / "models" / "row_conv_tiny.json")
SGD = OptimizerConfig(name="sgd", lr=0.1, schedule="constant")
ROWS, STEPS = 4, 4


class Batches:
    """A loader of random pairs."""

    wait_seconds = 0.0
    bad_samples = BadSamples(0.0)

    def position(self) -> dict[str, Any]:
        return {}

    def describe(self, sample_id: int) -> str:
        return f"sample {sample_id}"

    def __init__(self, micro_steps: int) -> None:
        self.micro_steps = micro_steps

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        for step in range(start, stop):
            yield [self.batch(step * self.micro_steps + number) for number in range(self.micro_steps)]

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        token = torch.randint(3, 400, (ROWS, 40), generator=generator)
        token[:, -1] = 511
        return {
            "image_BCHW": torch.randint(0, 256, (ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8),
            "token_BL": token,
            "pid_B": torch.arange(ROWS) + seed,
            "sample_id_B": torch.arange(ROWS),
        }


class Log(StageLog):
    """Keeps what a stage's log would write."""

    history: list[dict[str, Any]] = []  # noqa: RUF012 (nobody adds to it)

    def state(self) -> dict[str, Any]:
        return {}

    def __init__(self) -> None:
        self.name = "t2i"
        self.own_work = OwnWork(torch.device("cpu"), 0.0)
        self.added: list[dict[str, float]] = []
        self.steps: list[int] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.added.append({name: float(value.detach()) for name, value in metrics.items()})

    def step_done(self, step: int, *others: Any) -> None:
        self.steps.append(step)


class RecordingStage(T2IStage):
    """Keeps when the trainer called it, with what, and its own state afterwards."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
        loss = TextLoss(positives="pair", queue_mask="batch", queue_size=30, momentum=0.5, queue_check_every=0)
        super().__init__(encoder, loss, run=Surroundings(ROWS))
        self.calls: list[Any] = []
        self.beside: list[list[Tensor]] = []

    def start(self, weights: Weights) -> None:
        super().start(weights)
        self.calls.append("start")

    def prepare(self, micro_batches: list[Batch]) -> list[Batch]:
        self.calls.append("prepare")
        return super().prepare(micro_batches)

    def after_step(self, states: list[State], updated: bool, weights: Weights) -> None:  # type: ignore[override]
        super().after_step(states, updated, weights)
        self.calls.append((len(states), updated))
        assert self.moco is not None
        ring = self.moco.queue.ring
        kept = [ring.image_XD, ring.text_XD, ring.ids_X, ring.sequence_X, ring.next]
        self.beside.append([x.clone() for x in (*kept, *self.moco.key_encoder.state().values())])


class SkippingEngine(DeepSpeedEngine):
    """Skips the third optimizer step as an engine does that met what is not finite: nothing is applied."""

    micro_steps = 0

    def step(self, skip: bool = False) -> bool:
        self.micro_steps += 1
        before = {name: p.detach().clone() for name, p in self.stage.named_parameters()}
        updated = super().step(skip)
        if updated and self.micro_steps == 3 * self.config.gradient_accumulation_steps:
            with torch.no_grad():
                for name, parameter in self.stage.named_parameters():
                    parameter.copy_(before[name])
            return False
        return updated


def run(
    micro_steps: int, cached: bool, folder: Path, asynchronous: bool = False, save_every: int = 0
) -> tuple[list[Any], list[list[Tensor]], list[dict[str, float]], list[int]]:
    stage = RecordingStage()
    config = EngineConfig(zero_stage=0, gradient_accumulation_steps=micro_steps, cached_gradients=cached)
    engine, log, loader = SkippingEngine(stage, config, SGD, ROWS), Log(), Batches(micro_steps)
    guard = Guard(GuardConfig(), engine, loader.describe)
    about = {"stage": "t2i", "kind": "t2i", "steps": STEPS, "fingerprint": "", "model": {}, "words": None}
    state = TrainingState(engine, loader, log, guard, torch.device("cpu"), about, ROWS * micro_steps)
    with StopRequest(10) as request, Watchdog(60, folder) as watchdog:
        writer = CheckpointWriter(folder / "checkpoints", STEPS, False, asynchronous)
        companions = Companions(watchdog, StopAgreement(request), 0, None, writer, save_every)
        train(state, SGD, STEPS, companions)
    engine.close()
    return stage.calls, stage.beside, log.added, log.steps


MODES = [(1, False), (3, False), (3, True)]


def run_all(folder: Path) -> list[tuple]:
    return [run(*mode, folder / str(number)) for number, mode in enumerate(MODES)]


@pytest.fixture(scope="module")
def runs(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, bool], tuple]:
    return dict(zip(MODES, run_ranks(1, run_all, tmp_path_factory.mktemp("runs"))[0], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_stage_is_called_in_order_with_the_states_of_all_micro_steps(mode: tuple[int, bool], runs) -> None:
    calls, _, added, steps = runs[mode]
    done = [["prepare", (mode[0], step != 2)] for step in range(STEPS)]
    assert calls == ["start", *(call for pair in done for call in pair)]
    assert steps == list(range(STEPS))
    assert len(added) == STEPS * (1 if mode[1] else mode[0])
    assert all(set(metrics) == {"loss", "contrastive", "logit_scale"} for metrics in added)


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_changes_neither_queue_nor_momentum_encoder(mode: tuple[int, bool], runs) -> None:
    _, (first, second, skipped, last), _, _ = runs[mode]
    assert all(x.equal(y) for x, y in zip(second, skipped, strict=True))
    for before, after in ((first, second), (skipped, last)):  # the others change all of it
        assert not any(x.equal(y) for x, y in zip(before[:5], after[:5], strict=True))
        assert any(not x.equal(y) for x, y in zip(before[5:], after[5:], strict=True))


def test_accumulation_enqueues_the_micro_steps_in_order(runs) -> None:
    """Both ways; and after the skip the queue goes on where it was."""
    for mode in MODES[1:]:
        ids, sequence = runs[mode][1][-1][2:4]
        expected = torch.cat([torch.arange(ROWS) + 3 * step + number for step in (0, 1, 3) for number in range(3)])
        newest = torch.arange(36)[-30:]
        for number in newest.tolist():
            assert (int(ids[number % 30]), int(sequence[number % 30])) == (int(expected[number]), number)


def save_at_once_and_late(folder: Path, *mode: Any) -> list[dict[int, dict[str, str]]]:
    """The digests of every save; what may be copied beside training is copied late the second time."""
    copy = writer_module.with_pieces

    def late(*arguments: Any) -> Snapshot:
        time.sleep(0.3)
        return copy(*arguments)

    found = []
    for name, slowed in (("at once", copy), ("late", late)):
        writer_module.with_pieces = slowed
        run(*mode, folder / name, asynchronous=slowed is late, save_every=1)
        saved = saved_steps(folder / name / "checkpoints")
        found.append({step: read_manifest(path)[0].digests for step, path in saved.items()})
    return found


@pytest.mark.parametrize("mode", MODES)
def test_weights_stay_until_a_save_has_copied_them(mode: tuple[int, bool], run_ranks, tmp_path: Path) -> None:
    at_once, late = run_ranks(1, save_at_once_and_late, tmp_path, *mode)[0]
    assert list(at_once) == [1, 2, 3] and at_once == late
    assert len({digests["weights"] for digests in at_once.values()}) == 2  # the engine skips the third step
