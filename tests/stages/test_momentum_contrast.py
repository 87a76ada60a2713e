"""The loss against a queue beside loops over anchors and keys, and what moves between steps."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.config import OptimizerConfig, PretrainLoss, T2IStageConfig, TextLoss
from reid_dist.distributed import rank
from reid_dist.errors import DivergenceError
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages import PretrainStage, Stage, T2IStage, build_stage
from reid_dist.stages.contract import Surroundings

ROWS = 6
SIZE = 15  # two and a half steps
MOMENTUM = 0.6
SETTINGS = {
    "published": TextLoss(positives="pair", queue_mask="batch", temperature=0.07, queue_size=SIZE, momentum=MOMENTUM),
    "published_random": TextLoss(
        positives="pair", queue_mask="batch", queue_init="random_as_published", queue_size=SIZE, momentum=MOMENTUM
    ),
    "pair": TextLoss(positives="pair", queue_size=SIZE, momentum=MOMENTUM),
    "pair_in_batch": TextLoss(positives="pair", in_batch_negatives=True, queue_size=SIZE, momentum=MOMENTUM),
    "identity": TextLoss(queue_size=SIZE, momentum=MOMENTUM),
    "identity_batch": TextLoss(queue_mask="batch", queue_size=SIZE, momentum=MOMENTUM),
    "identity_in_batch": TextLoss(in_batch_negatives=True, queue_size=SIZE, momentum=MOMENTUM),
    "pretrain": PretrainLoss(in_batch_negatives=True, queue_size=SIZE, momentum=MOMENTUM),
}


def make_batch(step: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    token = torch.randint(3, 49, (rows, 8), generator=generator)
    token[:, 7] = 49
    return {
        "image_BCHW": torch.randint(0, 256, (rows, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.randint(0, 9, (rows,), generator=generator),
        # Every other sample comes again in the next step.
        "sample_id_B": torch.arange(rows) + step * rows // 2,
    }


def make_stage(make_encoder: Callable[..., DualEncoder], name: str, **place: Any) -> Stage:
    setting = SETTINGS[name]
    where = Surroundings(ROWS, **place)
    stage: Stage
    if isinstance(setting, TextLoss):
        stage = T2IStage(make_encoder(), setting, run=where)
    else:
        stage = PretrainStage(make_encoder(), setting, run=where)
    return stage.train()  # type: ignore[return-value]


def optimizer_of(stage: Stage) -> torch.optim.Optimizer:
    config = OptimizerConfig(name="sgd", lr=0.3)
    return build_optimizer(parameter_groups(stage.trainable(), config), config)


def steps(stage: Stage, weights_of: Callable, count: int = 4) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Trains; yields (batch, output) before the weights move."""
    optimizer = optimizer_of(stage)
    stage.start(weights_of(stage))
    for step in range(count):
        output = stage(make_batch(step))
        yield make_batch(step), output
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        stage.after_step([output["state"]], True, weights_of(stage))


class Oracle:
    """The same with a list for the queue and numbers for everything else."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.key_encoder = copy.deepcopy(stage.encoder)
        self.setting, self.ids = SETTINGS[name], stage.moco.ids
        self.pair = getattr(self.setting, "positives", "pair") == "pair"
        self.queue: list[tuple[list[float], list[float], int]] = []
        assert stage.moco is not None
        if self.setting.queue_init != "empty":
            ring = stage.moco.queue.ring
            self.queue = [(ring.image_XD[i].tolist(), ring.text_XD[i].tolist(), -2) for i in range(SIZE)]

    def loss(self, encoder: DualEncoder, batch: dict[str, Tensor]) -> float:
        self.current = self.rows(self.key_encoder, batch)
        anchors = self.rows(encoder, batch)
        temperature = self.setting.temperature or math.exp(-encoder.logit_scale.item())
        total = sum(
            self.row(anchor[side], own, side, temperature)
            for anchor, own in zip(anchors, self.current, strict=True)
            for side in (0, 1)
        )
        return total / len(anchors) / (1 if self.pair else 2)

    def rows(self, encoder: DualEncoder, batch: dict[str, Tensor]) -> list[tuple[list[float], list[float], int]]:
        with torch.no_grad():
            image = F.normalize(encoder.encode_image(batch["image_BCHW"]), dim=1).tolist()
            text = F.normalize(encoder.encode_text(batch["token_BL"]), dim=1).tolist()
        return list(zip(image, text, batch[self.ids].tolist(), strict=True))

    def row(self, anchor: list[float], own: tuple, side: int, temperature: float) -> float:
        """-mean over positives of log [ exp(a.k / T) / sum over positives and negatives ]."""

        def logit(key: tuple) -> float:
            return sum(x * y for x, y in zip(anchor, key[1 - side], strict=True)) / temperature

        batch_ids = {key[2] for key in self.current}
        masked = batch_ids if self.setting.queue_mask == "batch" else {own[2]}
        others = [key for key in self.current if key is not own] if self.setting.in_batch_negatives else []
        known = self.queue + others
        negatives = [logit(key) for key in known if key[2] not in masked]
        positives = [logit(own)] + ([] if self.pair else [logit(key) for key in known if key[2] == own[2]])
        every = math.log(sum(math.exp(x) for x in positives + negatives))
        return sum(every - x for x in positives) / len(positives)

    def after_step(self, encoder: DualEncoder) -> None:
        self.queue = (self.queue + self.current)[-SIZE:]
        with torch.no_grad():
            for slow, live in zip(self.key_encoder.parameters(), encoder.parameters(), strict=True):
                slow.copy_(MOMENTUM * slow + (1 - MOMENTUM) * live)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_of_every_setting_is_that_of_loops_over_keys(name: str, make_encoder, weights_of) -> None:
    stage = make_stage(make_encoder, name)
    oracle = Oracle(stage, name)
    found, expected = [], []
    for batch, output in steps(stage, weights_of):
        if found:
            oracle.after_step(stage.encoder)
        found.append(output["loss"].item())
        expected.append(oracle.loss(stage.encoder, batch))
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert min(found[1:]) > 0.02


def test_a_sample_of_pretraining_that_is_met_again_is_no_negative(make_encoder, weights_of) -> None:
    """What the ids of the oracle above stand for."""
    stage = make_stage(make_encoder, "pretrain")
    (_, first), (_, second), *_ = list(steps(stage, weights_of))
    first_ids, second_ids = (set(output["state"]["pending"].wait()[2].tolist()) for output in (first, second))
    assert first_ids & second_ids == {3, 4, 5}


def test_no_queue_and_an_empty_queue_with_in_batch_keys_start_with_the_same_loss(make_encoder, weights_of) -> None:
    """Key encoders begin as the encoders, so a change from `queue_size: 0` does not change the loss's scale."""
    with_queue = make_stage(make_encoder, "identity_in_batch")
    without = T2IStage(make_encoder(), TextLoss()).train()
    _, output = next(steps(with_queue, weights_of))
    torch.testing.assert_close(output["loss"], without(make_batch())["loss"])


def test_an_empty_queue_of_pairs_has_no_loss_and_no_gradient(make_encoder, weights_of) -> None:
    stage = make_stage(make_encoder, "pair")
    _, output = next(steps(stage, weights_of))
    output["loss"].backward()
    assert output["loss"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in stage.parameters())


# Between steps


def everything_beside(stage: Stage) -> list[Tensor]:
    assert stage.moco is not None
    ring = stage.moco.queue.ring
    slots = [x[: ring.slots] for x in (ring.image_XD, ring.text_XD, ring.ids_X, ring.sequence_X)]
    state = [*slots, ring.next]
    return [x.clone() for x in (*state, *stage.moco.key_encoder.state().values())]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_skipped_step_leaves_queue_and_key_encoders_bit_by_bit(name: str, make_encoder, weights_of) -> None:
    stage = make_stage(make_encoder, name)
    list(steps(stage, weights_of, 2))
    before = everything_beside(stage)
    output = stage(make_batch(7))
    output["loss"].backward()
    optimizer_of(stage).step()
    stage.after_step([output["state"]], False, weights_of(stage))
    assert all(x.equal(y) for x, y in zip(before, everything_beside(stage), strict=True))
    stage.after_step([output["state"]], True, weights_of(stage))  # what the test would see
    assert not any(x.equal(y) for x, y in zip(before[:5], everything_beside(stage)[:5], strict=True))


def test_queue_and_key_encoders_are_no_part_of_the_module(make_encoder) -> None:
    with_queue, without = make_stage(make_encoder, "pair"), T2IStage(make_encoder(), TextLoss())
    assert list(with_queue.state_dict()) == list(without.state_dict())
    assert len(list(with_queue.modules())) == len(list(without.modules()))
    assert [n for n, _ in with_queue.named_buffers()] == [n for n, _ in without.named_buffers()]


def test_key_encoders_start_from_the_engine_s_weights_not_from_their_copy(make_encoder, weights_of) -> None:
    stage = make_stage(make_encoder, "pair")
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(1)
    stage.start(weights_of(stage))
    assert stage.moco is not None
    state = stage.moco.key_encoder.state()
    assert state and all(x.equal(stage.state_dict()[name]) for name, x in state.items())


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_frozen_tower_runs_once_and_gives_keys_and_anchors(tower: str, make_encoder) -> None:
    stage = T2IStage(make_encoder(), SETTINGS["pair_in_batch"], (tower,), Surroundings(ROWS)).train()
    calls = []
    getattr(stage.encoder, tower).register_forward_hook(lambda module, inputs, output: calls.append(output))
    state = stage.keys(make_batch())
    features = stage.features(make_batch(), state)
    name = "image_BD" if tower == "visual" else "text_BD"
    assert len(calls) == 1 and features[name] is calls[0]
    assert state[name].equal(F.normalize(calls[0], dim=1))
    assert stage.moco is not None
    other = "encoder.text." if tower == "visual" else "encoder.visual."
    assert all(key.startswith(other) for key in stage.moco.key_encoder.names)


def test_the_gather_starts_before_the_anchors_are_encoded(make_encoder, monkeypatch) -> None:
    stage = make_stage(make_encoder, "pair_in_batch")
    assert stage.moco is not None
    order: list[str] = []
    gather = stage.moco.queue.gather
    monkeypatch.setattr(stage.moco.queue, "gather", lambda *rows: order.append("gather") or gather(*rows))
    stage.encoder.visual.register_forward_hook(lambda *_: order.append("anchors"))
    stage(make_batch())
    assert order == ["gather", "anchors"]


def test_only_the_mask_of_the_batch_needs_the_ids_of_the_step(make_encoder) -> None:
    batches = [make_batch(0), make_batch(1)]
    assert make_stage(make_encoder, "pair").prepare(batches) is batches
    prepared = make_stage(make_encoder, "published").prepare(batches)
    ids = torch.cat([batch["pid_B"] for batch in batches])
    assert [set(batch) - set(batches[0]) for batch in prepared] == [{"step_id_S"}] * 2
    assert all(batch["step_id_S"].equal(ids) for batch in prepared)


def diverged(make_encoder, weights_of, what: str) -> str:
    """Two steps with `queue_check_every: 2`, a bit of one rank changed before the second."""
    setting = TextLoss(queue_size=SIZE, queue_check_every=2)
    stage = T2IStage(make_encoder(), setting, run=Surroundings(ROWS)).train()
    assert stage.moco is not None
    try:
        for number, _ in enumerate(steps(stage, weights_of, 2)):
            if number == 1 and rank() == 1 and what == "queue":
                stage.moco.queue.ring.text_XD[10, 0] += 1e-6  # not overwritten
            if number == 1 and rank() == 1 and what == "momentum":
                stage.moco.key_encoder.state()["encoder.text.positional_embedding"][0, 0] += 1e-3
    except DivergenceError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(("what", "said"), [("queue", "the feature queue"), ("momentum", "the momentum encoder")])
def test_a_rank_that_diverged_is_found(what: str, said: str, make_encoder, weights_of, run_ranks) -> None:
    for found in run_ranks(2, diverged, make_encoder, weights_of, what):
        assert found.startswith(f"{said} is not the same on all ranks")
    assert run_ranks(2, diverged, make_encoder, weights_of, "nothing") == ["agreed", "agreed"]


# Temperature and precision


def test_a_fixed_temperature_is_exact_and_does_not_train(make_encoder, weights_of) -> None:
    stage = make_stage(make_encoder, "published")
    for _, output in steps(stage, weights_of, 2):
        assert output["metrics"]["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert stage.encoder.logit_scale.item() == pytest.approx(math.log(1 / 0.07))  # and so it is exported
    stage.encoder.logit_scale.data = stage.encoder.logit_scale.data.bfloat16()
    output = stage(make_batch())
    assert output["metrics"]["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "stored", "forward"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_decides_what_is_kept_in_which_type(
    precision: Any, stored: torch.dtype, forward: torch.dtype, make_encoder
) -> None:
    stage = make_stage(make_encoder, "pair", precision=precision)
    assert stage.moco is not None
    assert stage.moco.queue.ring.image_XD.dtype == stored
    assert {x.dtype for x in stage.moco.key_encoder.state().values()} == {torch.float32}
    assert stage.moco.key_encoder.encode_image(make_batch()["image_BCHW"]).dtype == forward


def test_settings_of_the_configuration_reach_queue_and_key_encoders(make_encoder) -> None:
    loss = TextLoss(queue_size=33, queue_init="random_as_published", queue_sharded=True, momentum=0.9, key_head="live")
    config = T2IStageConfig(name="t2i", kind="t2i", steps=0, loss=loss)
    stage = build_stage(config, make_encoder(), Surroundings(5, seed=3))
    assert isinstance(stage, Stage) and stage.moco is not None
    queue, same = stage.moco.queue, build_stage(config, make_encoder(), Surroundings(5, seed=3))
    assert (queue.size, queue.max_rows, queue.sharded, queue.features) == (33, 5, True, 12)
    assert stage.moco.key_encoder.momentum == 0.9
    assert isinstance(same, Stage) and same.moco is not None
    assert queue.digest() == same.moco.queue.digest() and bool(queue.ring.image_XD[:33].any(dim=1).all())
    assert stage.bytes_beside(1) > stage.bytes_beside(4) > stage.moco.key_encoder.nbytes
