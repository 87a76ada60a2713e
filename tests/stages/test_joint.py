"""The joint stage: image losses and text losses on the rows that each is about, and how far they disagree."""

import pytest
import torch
from torch import Tensor

from reid_dist.config import I2ILoss, TextLoss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.losses.identity import identity_loss
from reid_dist.losses.triplet import batch_hard_triplet_loss
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.conflict import block_of, gradient_cosines
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.i2i import I2IStage

IDENTITIES = 6
CAPTIONED = torch.tensor([False, True, True, False, True, False, False, True])
PIDS = torch.tensor([0, 3, 3, 0, 5, 1, 1, 5])


def make_batch(captioned_B: Tensor = CAPTIONED, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = len(captioned_B)
    token = torch.randint(3, 49, (int(captioned_B.sum()), 8), generator=generator)
    token[:, 7] = 49
    return {
        "image_BCHW": torch.randint(0, 256, (rows, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": PIDS[:rows],
        "camid_B": torch.zeros(rows, dtype=torch.int64),
        "sample_id_B": torch.arange(rows),
        "captioned_B": captioned_B,
    }


def make_stage(make_encoder, loss: I2ILoss, freeze: tuple[str, ...] = ()) -> I2IStage:
    torch.manual_seed(0)
    return I2IStage(make_encoder(), loss, freeze, Surroundings(8, identities=IDENTITIES)).train()


def gradients(stage: I2IStage) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in stage.named_parameters()}


@pytest.mark.parametrize("rows", ["all", "uncaptioned"])
def test_each_loss_sees_its_own_rows(rows: str, make_encoder) -> None:
    loss = I2ILoss(text_weight=0.7, triplet_weight=2, image_rows=rows)
    stage, batch = make_stage(make_encoder, loss), make_batch()
    twin = make_stage(make_encoder, loss)
    output = stage(batch)
    image = twin.encoder.encode_image(batch["image_BCHW"])
    text = twin.encoder.encode_text(batch["token_BL"])
    chosen = ~CAPTIONED if rows == "uncaptioned" else torch.ones(8, dtype=torch.bool)
    identity = identity_loss(twin.image_losses.head(image[chosen]), PIDS[chosen], 0.1)
    triplet = batch_hard_triplet_loss(image[chosen], PIDS[chosen], 0.3)
    contrast = contrastive_loss(image[CAPTIONED], text, twin.encoder.logit_scale, PIDS[CAPTIONED])
    torch.testing.assert_close(output["loss"], identity + 2 * triplet + 0.7 * contrast)


@pytest.mark.parametrize("mlm", [0.0, 1.0])
def test_a_batch_without_captions_gives_the_text_side_gradients_of_zero(mlm: float, make_encoder) -> None:
    text = TextLoss(identity_weight=1, mlm_weight=mlm) if mlm else TextLoss(identity_weight=1)
    stage = make_stage(make_encoder, I2ILoss(text_weight=1, text=text))
    batch = make_batch(torch.zeros(8, dtype=torch.bool))
    if mlm:
        batch["masked_token_BL"] = batch["token_BL"].clone()
        batch["masked_label_BL"] = batch["token_BL"].clone()
    output = stage(batch)
    output["loss"].backward()
    assert set(output["metrics"]) == {"identity", "triplet"}
    for name, gradient in gradients(stage).items():
        assert gradient is not None, name
        of_text = name.startswith(("encoder.text.", "text_losses.", "encoder.logit_scale"))
        assert (gradient.abs().sum() == 0) == of_text, name
    image_only = make_stage(make_encoder, I2ILoss())
    torch.testing.assert_close(output["loss"], image_only(batch)["loss"])


def test_a_batch_of_captions_alone_gives_the_image_losses_gradients_of_zero(make_encoder) -> None:
    stage = make_stage(make_encoder, I2ILoss(text_weight=1, image_rows="uncaptioned"))
    output = stage(make_batch(torch.ones(8, dtype=torch.bool)))
    output["loss"].backward()
    assert set(output["metrics"]) == {"contrastive", "logit_scale"}
    for name, gradient in gradients(stage).items():
        assert gradient is not None and (gradient.abs().sum() == 0) == name.startswith("image_losses."), name


def test_only_captioned_rows_become_keys(make_encoder, weights_of) -> None:
    text = TextLoss(positives="pair", queue_size=16)
    stage = make_stage(make_encoder, I2ILoss(text_weight=1, text=text))
    assert stage.moco is not None
    weights = weights_of(stage)
    stage.start(weights)
    for batch in (make_batch(), make_batch(torch.zeros(8, dtype=torch.bool))):
        output = stage(batch)
        output["loss"].backward()
        stage.after_step([output["state"]], True, weights)
    ids = stage.moco.queue.ring.ids_X
    assert ids[ids >= 0].tolist() == PIDS[CAPTIONED].tolist()


def test_the_ids_of_the_whole_step_reach_the_queue_s_mask(make_encoder) -> None:
    """With accumulation a micro-batch knows more ids than it has rows."""
    text = TextLoss(positives="pair", queue_size=16, queue_mask="batch")
    stage = make_stage(make_encoder, I2ILoss(text_weight=1, text=text))
    parts = stage.prepare([make_batch(), {**make_batch(seed=1), "pid_B": (PIDS + 1) % 6}])
    assert stage.moco is not None
    seen: list[Tensor] = []
    loss = stage.moco.loss
    stage.moco.loss = lambda *args: seen.append(args[3]["step_id_S"]) or loss(*args)  # type: ignore[method-assign]
    stage(parts[1])
    assert seen[0].tolist() == [*PIDS.tolist(), *((PIDS + 1) % 6).tolist()]


def test_cached_gradients_of_a_mixed_step_are_those_of_the_big_batch(make_encoder) -> None:
    loss = I2ILoss(text_weight=0.5, image_rows="uncaptioned", text=TextLoss(identity_weight=1))
    parts = [make_batch(CAPTIONED[:4].clone(), 1), make_batch(torch.tensor([True, False, True, False]), 2)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stage, twin = make_stage(make_encoder, loss), make_stage(make_encoder, loss)
    passes = [first_pass(stage, part) for part in parts]
    known = [{name: x for name, x in part.items() if x.dim() == 1} for part in parts]
    cached = joint_gradients(stage, known, passes)
    for index, (part, first) in enumerate(zip(parts, passes, strict=True)):
        (surrogate(stage, part, first, cached, index) / len(parts)).backward()
    output = twin(whole)
    output["loss"].backward()
    torch.testing.assert_close(cached.loss, output["loss"].detach())
    for (name, found), wanted in zip(gradients(stage).items(), gradients(twin).values(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name, rtol=1e-4, atol=1e-6)


# Gradient conflict


def brute_cosine(stage: I2IStage, one: Tensor, other: Tensor, block: str) -> float:
    named = [(n, p) for n, p in stage.encoder.visual.named_parameters() if block in ("all", block_of(n))]
    flat = []
    for loss in (one, other):
        stage.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        flat.append(torch.cat([p.grad.flatten().double() for _, p in named]))
    return float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())


def test_cosines_are_those_of_the_two_losses_gradients(make_encoder) -> None:
    stage, batch = make_stage(make_encoder, I2ILoss(text_weight=1)), make_batch()
    features = stage.features(batch, {})
    image_loss, _ = stage.image_losses(features["i2i_BD"], batch["pid_B"])
    text_loss = contrastive_loss(features["image_BD"], features["text_BD"], features["log_scale"], PIDS[CAPTIONED])
    found = gradient_cosines(stage.encoder.visual, image_loss, text_loss)
    assert {"conflict/all", "conflict/stem", "conflict/blocks.0", "conflict/blocks.1"} <= set(found)
    for name, value in found.items():
        wanted = brute_cosine(stage, image_loss, text_loss, name.removeprefix("conflict/"))
        assert float(value) == pytest.approx(wanted, abs=1e-6), name
    assert float(gradient_cosines(stage.encoder.visual, image_loss, 3 * image_loss)["conflict/all"]) == pytest.approx(1)


def test_the_stage_measures_conflict_now_and_then_and_changes_nothing(make_encoder, weights_of) -> None:
    watched = make_stage(make_encoder, I2ILoss(text_weight=1, conflict_every=2))
    plain = make_stage(make_encoder, I2ILoss(text_weight=1))
    seen = []
    for step in range(3):
        outputs = [stage(make_batch(seed=step)) for stage in (watched, plain)]
        seen.append(any(name.startswith("conflict/") for name in outputs[0]["metrics"]))
        for stage, output in zip((watched, plain), outputs, strict=True):
            stage.zero_grad(set_to_none=True)
            output["loss"].backward()
            stage.after_step([output["state"]], True, weights_of(stage))
        for (name, one), other in zip(gradients(watched).items(), gradients(plain).values(), strict=True):
            assert one is not None and other is not None and one.equal(other), name
    assert seen == [True, False, True]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer.resblocks.3.attn.in_proj_weight", "transformer.resblocks.3"),
        ("conv1.weight", "conv1"),
        ("class_embedding", "class_embedding"),
        ("layer1.0.conv1.weight", "layer1.0"),
    ],
)
def test_block_of(name: str, block: str) -> None:
    assert block_of(name) == block
