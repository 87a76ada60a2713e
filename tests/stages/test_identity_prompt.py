"""CLIP-ReID in both its stages: sentences learn from images, then images from the sentences."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reid_dist.config import I2ILoss, IdentityPromptLoss, IdentityPromptStageConfig, OptimizerConfig
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.losses.identity import identity_loss
from reid_dist.losses.prototype import identity_text_contrast
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages import Stage, build_stage
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.identity_prompt import IdentityPromptStage

IDENTITIES = 5
RUN = Surroundings(identities=IDENTITIES, tokenizer=WordTokenizer(["a", "person"], 8, 50))
LOSS = IdentityPromptLoss(template="a {} person", tokens=2)
PID = [0, 0, 1, 1, 2, 4]


def make_batch() -> dict[str, Tensor]:
    """As of an image set: captions are empty."""
    generator = torch.Generator().manual_seed(0)
    return {
        "image_BCHW": torch.randint(0, 256, (6, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": torch.zeros(6, 8, dtype=torch.int64),
        "pid_B": torch.tensor(PID),
        "camid_B": torch.zeros(6, dtype=torch.int64),
        "sample_id_B": torch.arange(6),
    }


def text_by_hand(stage: IdentityPromptStage, identity: int) -> Tensor:
    """Feature of "a [X][X] person" with an identity's tokens, all written out. Shape: (D,)."""
    tower = stage.encoder.text
    x = tower.token_embedding(torch.tensor([2, 3, 1, 1, 4, 49])).clone()
    x[2:4] = stage.prompts.token_CMW[identity]
    x = tower.transformer((x + tower.positional_embedding[:6])[None], attn_mask=tower.attn_mask[:6, :6])
    feature: Tensor = tower.ln_final(x)[0, 5] @ tower.text_projection
    return feature


def train(stage: Stage, steps: int, lr: float) -> list[float]:
    config = OptimizerConfig(name="adam", lr=lr, weight_decay=0.0)
    optimizer = build_optimizer(parameter_groups(stage.trainable(), config), config)
    stage.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = stage(make_batch())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("products", ["cosine", "plain"])
def test_the_loss_contrasts_images_with_their_identities_sentences(make_encoder: Callable, products: str) -> None:
    stage = IdentityPromptStage(make_encoder(), LOSS.model_copy(update={"products": products}), RUN).train()
    image = stage.encoder.encode_image(make_batch()["image_BCHW"])
    text = torch.stack([text_by_hand(stage, identity) for identity in PID])
    log_scale = stage.encoder.logit_scale if products == "cosine" else None
    output = stage(make_batch())
    torch.testing.assert_close(output["loss"], identity_text_contrast(image, text, torch.tensor(PID), log_scale))
    assert set(output["metrics"]) == {"identity_text"}


def test_a_temperature_of_its_own_leaves_the_encoders_alone(make_encoder: Callable) -> None:
    stage = IdentityPromptStage(make_encoder(), LOSS.model_copy(update={"temperature": 0.02}), RUN)
    assert stage.handover({})["identity_text_log_scale"].item() == pytest.approx(math.log(50), rel=1e-6)
    assert stage.encoder.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)


def test_only_the_learned_tokens_train(make_encoder: Callable) -> None:
    stage = IdentityPromptStage(make_encoder(), LOSS, RUN)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    losses = train(stage, 30, lr=0.05)
    assert losses[-1] < losses[0] - 0.5
    moved = {name for name, value in stage.state_dict().items() if not value.equal(before[name])}
    assert moved == {"prompts.token_CMW"}
    unseen = stage.prompts.token_CMW[3].equal(before["prompts.token_CMW"][3])
    assert unseen  # identity 3 has no image in this batch
    (old, new) = stage.trainable()
    assert (old.parameters, list(new.parameters), new.new) == ({}, ["prompts.token_CMW"], True)


def test_batch_norm_of_the_frozen_tower_stands_still(make_encoder: Callable) -> None:
    stage = IdentityPromptStage(make_encoder("resnet"), LOSS, RUN)
    before = {name: value.clone() for name, value in stage.encoder.state_dict().items()}
    train(stage, 1, lr=0.05)
    assert all(value.equal(before[name]) for name, value in stage.encoder.state_dict().items())


def test_what_is_handed_over_are_the_features_of_all_sentences_in_order(make_encoder: Callable) -> None:
    stage = IdentityPromptStage(make_encoder(), LOSS, RUN)
    train(stage, 2, lr=0.05)
    handed = stage.handover({})
    assert set(handed) == {"identity_text_CD", "identity_text_log_scale"}
    text_CD = handed["identity_text_CD"]
    assert text_CD.shape == (IDENTITIES, 12) and text_CD.dtype == torch.float32 and not text_CD.requires_grad
    for identity in range(IDENTITIES):
        torch.testing.assert_close(text_CD[identity], text_by_hand(stage, identity).detach())


def test_more_identities_than_are_read_at_once_are_handed_over(
    make_encoder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = IdentityPromptStage(make_encoder(), LOSS, RUN)
    whole = stage.handover({})["identity_text_CD"]
    monkeypatch.setattr("reid_dist.stages.identity_prompt._AT_ONCE", 2)
    torch.testing.assert_close(stage.handover({})["identity_text_CD"], whole)


@pytest.mark.parametrize("products", ["cosine", "plain"])
def test_the_next_stage_learns_from_the_sentences_of_all_identities(make_encoder: Callable, products: str) -> None:
    sentences = IdentityPromptStage(make_encoder(), LOSS.model_copy(update={"products": products}), RUN)
    handed = sentences.handover({})
    weights = I2ILoss(identity_weight=0.25, identity_text_weight=2.0, label_smoothing=0.1)
    stage = I2IStage(make_encoder(), weights, run=Surroundings(identities=IDENTITIES, handed=handed)).train()
    image, text = stage.encoder.encode_image(make_batch()["image_BCHW"]), handed["identity_text_CD"]
    if products == "plain":
        logits = image @ text.T
    else:
        logits = (image @ text.T) / image.norm(dim=1)[:, None] / text.norm(dim=1) / 0.07
    output = stage(make_batch())
    parts = output["metrics"]
    torch.testing.assert_close(parts["identity_text"], identity_loss(logits, torch.tensor(PID), 0.1))
    torch.testing.assert_close(output["loss"], 0.25 * parts["identity"] + parts["triplet"] + 2 * parts["identity_text"])
    first, *_, last = train(stage, 20, lr=0.003)
    assert last < first - 0.5


def test_a_stage_that_nothing_was_handed_to_says_so(make_encoder: Callable) -> None:
    weights = I2ILoss(identity_text_weight=1.0)
    with pytest.raises(UserError, match=re.escape("loss.identity_text_weight: the stage before has left no sentences")):
        I2IStage(make_encoder(), weights, run=Surroundings(identities=IDENTITIES))
    handed = IdentityPromptStage(make_encoder(), LOSS, RUN).handover({})
    with pytest.raises(UserError, match=r"there are 6 training identities, but .* sentences of 5"):
        I2IStage(make_encoder(), weights, run=Surroundings(identities=6, handed=handed))


def test_cached_gradients_are_those_of_the_whole_step(make_encoder: Callable) -> None:
    """Two micro-batches whose negatives see each other; the learned tokens are no part of the encoder."""
    batch = make_batch()
    whole = IdentityPromptStage(make_encoder(), LOSS, RUN).train()
    whole(batch)["loss"].backward()
    expected = whole.prompts.token_CMW.grad
    stage = IdentityPromptStage(make_encoder(), LOSS, RUN).train()
    stage.load_state_dict(whole.state_dict())
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 3), slice(3, 6))]
    passes = [first_pass(stage, part) for part in parts]
    light = [{"pid_B": part["pid_B"]} for part in parts]
    cached = joint_gradients(stage, light, passes)
    for index, part in enumerate(parts):
        (surrogate(stage, part, passes[index], cached, index) / 2).backward()
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(stage.prompts.token_CMW.grad, expected, rtol=1e-4, atol=1e-4)


def test_the_configuration_builds_it(make_encoder: Callable) -> None:
    config = IdentityPromptStageConfig(
        name="sentences", kind="identity_prompt", steps=1, data={"train": ["m"]}, loss=LOSS
    )
    stage = build_stage(config, make_encoder(), RUN)
    assert isinstance(stage, IdentityPromptStage) and stage.frozen == ("visual", "text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "a photo of a person."}, "template: 'a photo of a person.' must have one {}"),
        ({"template": "{} and {}"}, "must have one {}"),
        ({"products": "plain", "temperature": 0.02}, "temperature: plain products have none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        IdentityPromptLoss(**settings)
