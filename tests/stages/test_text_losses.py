"""The sum of losses between images and captions, and the stages that are made of little else."""

import math

import pytest
import torch
from torch import Tensor

from reid_dist.config import PretrainLoss, TextLoss
from reid_dist.errors import UserError
from reid_dist.losses.alignment import alignment_loss
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.losses.identity import identity_loss
from reid_dist.losses.mlm import masked_language_loss
from reid_dist.losses.sdm import sdm_loss
from reid_dist.losses.sigmoid import sigmoid_loss
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage
from reid_dist.stages.text_losses import IDENTITY_IMAGES, TextLosses, fix_temperature

PIDS = torch.tensor([0, 0, 1, 2, 2, 4])
RUN = Surroundings(6, identities=5)
ALL = TextLoss(
    contrastive_weight=0.3,
    sdm_weight=0.5,
    alignment_weight=0.7,
    identity_weight=1.1,
    classifier="normalised",
    label_smoothing=0.2,
    mlm_weight=1.3,
    mlm_depth=1,
)


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(3, 49, (6, 8), generator=generator)
    token[:, 7] = 49
    hidden = torch.zeros(6, 8, dtype=torch.bool)
    hidden[:, 2] = True
    return {
        "image_BCHW": torch.randint(0, 256, (6, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": PIDS,
        "sample_id_B": torch.arange(6),
        "masked_token_BL": token.masked_fill(hidden, 1),
        "masked_label_BL": token.masked_fill(~hidden, -100),
    }


def test_the_loss_is_the_weighted_sum_of_its_parts(make_encoder) -> None:
    torch.manual_seed(0)
    stage, batch = T2IStage(make_encoder(), ALL, run=RUN).train(), make_batch()
    output = stage(batch)
    image = stage.encoder.visual(stage.encoder._normalize(batch["image_BCHW"]), details=True)
    text = stage.encoder.text(batch["token_BL"])
    scale, classifier = stage.encoder.logit_scale, stage.text_losses.classifier
    hidden = stage.encoder.text(batch["masked_token_BL"], details=True).tokens
    parts = {
        "contrastive": contrastive_loss(image.features, text, scale, PIDS),
        "sdm": sdm_loss(image.features, text, scale, PIDS),
        "alignment": alignment_loss(image.features, text, PIDS),
        "identity": sum(identity_loss(classifier(x), PIDS, 0.2) for x in (image.features, text)) / 2,
        "mlm": masked_language_loss(stage.text_losses.cross_modal(hidden, image.tokens), batch["masked_label_BL"]),
    }
    assert set(output["metrics"]) == {*parts, "logit_scale"}
    for name, part in parts.items():
        torch.testing.assert_close(output["metrics"][name], part, msg=name)
    expected = sum(getattr(ALL, f"{name}_weight") * part for name, part in parts.items())
    torch.testing.assert_close(output["loss"], expected)


def test_prototypes_draw_captions_to_the_images_of_their_identity(make_encoder) -> None:
    setting = TextLoss(contrastive_weight=0, identity_weight=2, classifier="prototypes", label_smoothing=0.1)
    prototype_CD = torch.nn.functional.normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(1)), dim=1)
    run = Surroundings(6, identities=5, handed={IDENTITY_IMAGES: prototype_CD})
    stage, batch = T2IStage(make_encoder(), setting, freeze=["visual"], run=run).train(), make_batch()
    text = torch.nn.functional.normalize(stage.encoder.text(batch["token_BL"]).double(), dim=1)
    logits = stage.encoder.logit_scale.double().exp() * text @ prototype_CD.double().T
    wanted = torch.full((6, 5), 0.1 / 5, dtype=torch.float64)
    wanted[torch.arange(6), PIDS] += 0.9
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    output = stage(batch)
    torch.testing.assert_close(output["loss"].double(), 2 * expected, rtol=1e-6, atol=1e-6)
    output["loss"].backward()
    trained = {name for name, weight in stage.named_parameters() if weight.grad is not None}
    assert "encoder.logit_scale" in trained and any(name.startswith("encoder.text.") for name in trained)
    assert not any(name.startswith("encoder.visual.") for name in trained)


def test_prototypes_must_be_handed_over(make_encoder) -> None:
    setting = TextLoss(identity_weight=1, classifier="prototypes")
    with pytest.raises(ValueError, match="without prototypes"):
        T2IStage(make_encoder(), setting, freeze=["visual"], run=RUN)


def test_a_shared_classifier_is_not_counted_twice() -> None:
    shared = torch.nn.Linear(12, 5)
    setting = TextLoss(contrastive_weight=0, identity_weight=1, classifier="shared")
    losses = TextLosses(setting, 12, 50, 5, shared=shared)
    assert list(losses.parameters()) == []
    features = {"image_BD": torch.randn(6, 12), "text_BD": torch.randn(6, 12), "log_scale": torch.zeros(1)}
    found, _ = losses(features, {"pid_B": PIDS}, [], None)
    wanted = sum(identity_loss(shared(features[name]), PIDS, 0.0) for name in ("image_BD", "text_BD")) / 2
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("setting", "trains", "scale"),
    [
        (TextLoss(), True, 1 / 0.07),
        (TextLoss(temperature=0.02), False, 50),
        (TextLoss(contrastive_weight=0, sdm_weight=1), True, 1 / 0.07),
        (TextLoss(contrastive_weight=0, alignment_weight=1), False, 1 / 0.07),  # no loss looks at it
        (PretrainLoss(temperature=0.1), False, 10),
    ],
)
def test_a_temperature_is_learned_or_fixed(setting, trains: bool, scale: float, make_encoder) -> None:
    encoder = make_encoder()
    fix_temperature(encoder, setting)
    assert encoder.logit_scale.requires_grad == trains
    assert math.exp(encoder.logit_scale.item()) == pytest.approx(scale)


def test_towers_without_tokens_are_refused_for_hidden_words(make_encoder) -> None:
    with pytest.raises(UserError, match=r"loss\.mlm_weight: .* image tower gives no tokens"):
        T2IStage(make_encoder("resnet"), TextLoss(mlm_weight=1), run=RUN)


def test_sigmoid_pretraining_learns_its_bias(make_encoder) -> None:
    stage, batch = PretrainStage(make_encoder(), PretrainLoss(objective="sigmoid")).train(), make_batch()
    output = stage(batch)
    image, text, log_scale = stage.encoder(batch["image_BCHW"], batch["token_BL"])[:3]
    wanted = sigmoid_loss(image, text, log_scale, torch.full((1,), -10.0), batch["sample_id_B"])
    torch.testing.assert_close(output["loss"], wanted)
    output["loss"].backward()
    assert stage.bias.grad is not None and stage.bias.grad.abs() > 0
    assert any("bias" in group.parameters and group.new for group in stage.trainable())


def test_a_sigmoid_stage_goes_on_with_the_bias_of_the_one_before(make_encoder) -> None:
    stage = PretrainStage(make_encoder(), PretrainLoss(objective="sigmoid"))
    handed = stage.handover({"bias": torch.tensor([-4.5])})
    following = PretrainStage(make_encoder(), PretrainLoss(objective="sigmoid"), run=Surroundings(6, handed=handed))
    assert following.bias.item() == -4.5
    assert PretrainStage(make_encoder(), PretrainLoss()).handover({}) == {}


def test_patch_dropout_is_of_the_stage_and_of_training_alone(make_encoder) -> None:
    encoder, batch = make_encoder("dropout"), make_batch()
    stage = PretrainStage(encoder, PretrainLoss(), patch_dropout=0.5)
    assert not stage.train()(batch)["loss"].equal(stage(batch)["loss"])
    assert stage.eval()(batch)["loss"].equal(stage(batch)["loss"])
    with pytest.raises(UserError, match="patch_dropout"):
        PretrainStage(make_encoder("row_conv"), PretrainLoss(), patch_dropout=0.5)


def test_a_sigmoid_stage_begins_with_the_published_scale_and_keeps_that_of_the_one_before(make_encoder) -> None:
    encoder, setting = make_encoder(), PretrainLoss(objective="sigmoid")
    first = PretrainStage(encoder, setting)
    assert encoder.logit_scale.exp().item() == pytest.approx(10) and first.bias.item() == -10
    encoder.logit_scale.data.fill_(3.0)
    assert PretrainStage(encoder, setting).encoder.logit_scale.item() == 3.0, "loaded from elsewhere"
    handed = first.handover({"bias": torch.full((1,), -7.0)})
    second = PretrainStage(encoder, setting, run=Surroundings(6, handed=handed))
    assert encoder.logit_scale.item() == 3.0 and second.bias.item() == -7
    fixed = PretrainStage(make_encoder(), PretrainLoss(objective="sigmoid", temperature=0.1))
    assert fixed.encoder.logit_scale.exp().item() == pytest.approx(10)
