"""Cached gradients beside one graph through the features of all micro-batches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.config import I2ILoss, PretrainLoss, TextLoss
from reid_dist.stages import I2IStage, PretrainStage, Stage, T2IStage
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.contract import Batch, Surroundings

ROWS, PARTS = 4, 3
QUEUE = TextLoss(queue_size=20, queue_init="random_as_published", in_batch_negatives=True)


def make_stage(name: str, make_encoder: Callable, vision: str = "row_conv") -> Stage:
    encoder = make_encoder(vision)
    stages: dict[str, Callable[[], Stage]] = {
        "t2i": lambda: T2IStage(encoder, TextLoss()),
        "t2i_fixed": lambda: T2IStage(encoder, TextLoss(temperature=0.1)),
        "t2i_frozen": lambda: T2IStage(encoder, TextLoss(), ("visual",)),
        "pretrain": lambda: PretrainStage(encoder, PretrainLoss()),
        "i2i": lambda: I2IStage(encoder, I2ILoss(text_weight=0.5), run=Surroundings(identities=9)),
        "i2i_image": lambda: I2IStage(encoder, I2ILoss(), run=Surroundings(identities=9)),
        "queue": lambda: T2IStage(encoder, QUEUE, run=Surroundings(ROWS)),
        "queue_frozen": lambda: T2IStage(encoder, QUEUE, ("text",), Surroundings(ROWS)),
    }
    return stages[name]().train()


NAMES = ("t2i", "t2i_fixed", "t2i_frozen", "pretrain", "i2i", "i2i_image", "queue", "queue_frozen")


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(3, 49, (PARTS, ROWS, 8), generator=generator)
    token[:, :, 7] = 49
    image = torch.randint(0, 256, (PARTS, ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8)
    pid = torch.randint(0, 9, (PARTS, ROWS), generator=generator)
    return [
        {"image_BCHW": image[i], "token_BL": token[i], "pid_B": pid[i], "sample_id_B": torch.arange(ROWS) + ROWS * i}
        for i in range(PARTS)
    ]


def known(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("pid_B", "sample_id_B")}


def taken(stage: Stage) -> dict[str, Tensor]:
    gradients = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    stage.zero_grad()
    return gradients


def in_one_graph(stage: Stage, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The big batch: all micro-batches' features, each from a forward of its own, under one loss."""
    states, parts = [], []
    for batch in batches:
        states.append(stage.keys(batch))
        parts.append(stage.features(batch, states[-1]))
    features = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name.endswith("_BD")}
    features |= {name: parts[0][name] for name in parts[0] if not name.endswith("_BD")}
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in ("pid_B", "sample_id_B")}
    loss, _ = stage.loss(features, rows, states)
    loss.backward()
    return loss.item(), taken(stage)


def in_three_passes(stage: Stage, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """As the trainer does, with a mean over micro-batches in place of the engine's."""
    passes = [first_pass(stage, batch) for batch in batches]
    cached = joint_gradients(stage, [known(batch) for batch in batches], passes)
    for index, (batch, first) in enumerate(zip(batches, passes, strict=True)):
        (surrogate(stage, batch, first, cached, index) / len(batches)).backward()
    return cached.loss.item(), taken(stage)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_those_of_the_big_batch(name: str, make_encoder) -> None:
    exact = "queue" not in name
    stages = [make_stage(name, make_encoder) for _ in range(2)]
    if exact:  # keys are fp32
        stages = [stage.double() for stage in stages]
    expected_loss, expected = in_one_graph(stages[0], make_batches())
    found_loss, found = in_three_passes(stages[1], make_batches())
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert set(found) == set(expected) == {n for n, p in stages[0].named_parameters() if p.requires_grad}
    whole = torch.stack([x.norm() for x in expected.values()]).norm()
    for key, gradient in expected.items():
        error = (found[key] - gradient).norm()
        assert error <= (1e-9 if exact else 1e-5) * gradient.norm() + (1e-12 if exact else 1e-7) * whole, key


def test_the_loss_is_not_that_of_separate_micro_batches(make_encoder) -> None:
    """What caching is for: with less negatives the loss is another."""
    stage = make_stage("t2i", make_encoder)
    loss, _ = in_three_passes(stage, make_batches())
    apart = sum(stage(batch)["loss"].item() for batch in make_batches()) / PARTS
    assert apart < 0.8 * loss


def test_dropout_drops_the_same_in_both_runs(make_encoder) -> None:
    results = []
    for run in (in_one_graph, in_three_passes):
        stage = make_stage("t2i", make_encoder, "dropout").double()
        torch.manual_seed(3)
        results.append((*run(stage, make_batches()), torch.get_rng_state()))
    (expected_loss, expected, expected_random), (loss, found, random) = results
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-10)
    assert random.equal(expected_random)  # what follows is drawn as if each micro-batch had run once
    stage = make_stage("t2i", make_encoder, "dropout").double()
    torch.manual_seed(4)
    other, _ = in_three_passes(stage, make_batches())
    assert abs(other - loss) > 1e-4 * loss  # the tower does drop


def test_running_statistics_move_once_for_each_micro_batch(make_encoder) -> None:
    cached, plain = (make_stage("i2i", make_encoder, "resnet") for _ in range(2))
    in_three_passes(cached, make_batches())
    for batch in make_batches():
        plain(batch)
    moved = dict(plain.encoder.named_buffers())
    assert {key for key, x in cached.encoder.named_buffers() if not x.equal(moved[key])} == set()
    assert moved["visual.bn1.num_batches_tracked"] == PARTS


def test_a_head_s_statistics_are_those_of_the_whole_step(make_encoder) -> None:
    stage, whole = (make_stage("i2i_image", make_encoder) for _ in range(2))
    assert isinstance(stage, I2IStage) and isinstance(whole, I2IStage)
    in_three_passes(stage, make_batches())
    in_one_graph(whole, make_batches())
    torch.testing.assert_close(stage.image_losses.head.neck.running_mean, whole.image_losses.head.neck.running_mean)
