"""What all stages promise, and what each of them trains."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.config import (
    STAGE_CONFIGS,
    I2ILoss,
    IdentityPromptLoss,
    ModelConfig,
    OptimizerConfig,
    PretrainLoss,
    PromptConfig,
    StageConfig,
    TextLoss,
)
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.losses.contrastive import contrastive_loss
from reid_dist.losses.identity import identity_loss
from reid_dist.losses.triplet import batch_hard_triplet_loss
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.stages import STAGES, I2IStage, PretrainStage, Stage, T2IStage, build_stage
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.identity_prompt import IdentityPromptStage
from reid_dist.stages.prompt import PromptStage

IDENTITIES = 5
RUN = Surroundings(identities=IDENTITIES)
QUEUE = {"queue_size": 10, "queue_init": "random_as_published"}


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(3, 49, (6, 8), generator=generator)
    token[:, 7] = 49
    return {
        "image_BCHW": torch.randint(0, 256, (6, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.tensor([0, 0, 1, 1, 2, 4]),
        "camid_B": torch.zeros(6, dtype=torch.int64),
        "sample_id_B": torch.arange(6),
    }


def stage_config(kind: str, **settings: object) -> StageConfig:
    return STAGE_CONFIGS[kind](name=kind, kind=kind, steps=0, **settings)  # type: ignore[arg-type]


def make_stages(make_encoder) -> dict[str, Stage]:
    return {
        "pretrain": PretrainStage(make_encoder(), PretrainLoss()),
        "pretrain_locked_text": PretrainStage(make_encoder(), PretrainLoss(), ("text",)),
        "i2i": I2IStage(make_encoder(), I2ILoss(), run=RUN),
        "i2i_text": I2IStage(make_encoder(), I2ILoss(text_weight=0.5), run=RUN),
        "i2i_text_frozen": I2IStage(make_encoder(), I2ILoss(text_weight=0.5), ("text",), RUN),
        "t2i": T2IStage(make_encoder(), TextLoss()),
        "t2i_pair": T2IStage(make_encoder(), TextLoss(positives="pair")),
        "t2i_frozen": T2IStage(make_encoder(), TextLoss(), ("visual",)),
        "t2i_fixed": T2IStage(make_encoder(), TextLoss(temperature=0.07)),
        "t2i_queue": T2IStage(make_encoder(), TextLoss(**QUEUE), run=Surroundings(6)),
        "t2i_queue_frozen": T2IStage(make_encoder(), TextLoss(**QUEUE), ("visual",), Surroundings(6)),
        "pretrain_queue": PretrainStage(make_encoder(), PretrainLoss(**QUEUE), run=Surroundings(6)),
    }


NAMES = ("pretrain", "pretrain_locked_text", "i2i", "i2i_text", "i2i_text_frozen", "t2i", "t2i_pair", "t2i_frozen")
NAMES += ("t2i_fixed", "t2i_queue", "t2i_queue_frozen", "pretrain_queue")


def sgd_step(stage: Stage, lr: float = 0.1) -> dict[str, Tensor]:
    """One plain training step; returns the gradients by name."""
    config = OptimizerConfig(name="sgd", lr=lr, weight_decay=0.1)
    optimizer = build_optimizer(parameter_groups(stage.trainable(), config), config)
    stage.train()
    stage(make_batch())["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients


@pytest.mark.parametrize("name", NAMES)
def test_forward_keeps_the_contract(name: str, make_encoder, weights_of) -> None:
    stage = make_stages(make_encoder)[name].train()
    output = stage(make_batch())
    assert set(output) == {"loss", "metrics", "state"}
    assert output["loss"].shape == () and output["loss"].requires_grad and bool(output["loss"].isfinite())
    assert output["metrics"] and all(value.numel() == 1 for value in output["metrics"].values())
    stage.start(weights_of(stage))
    stage.after_step([output["state"]], updated=True, weights=weights_of(stage))


@pytest.mark.parametrize("name", NAMES)
def test_forward_of_a_stage_without_batch_statistics_changes_nothing(name: str, make_encoder) -> None:
    stage = make_stages(make_encoder)[name].train()
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    stage(make_batch())
    changed = {key for key, value in stage.state_dict().items() if not value.equal(before[key])}
    assert changed == (
        {"image_losses.head.neck.running_mean", "image_losses.head.neck.running_var"}
        if name.startswith("i2i")
        else set()
    )


@pytest.mark.parametrize("name", NAMES)
def test_trainable_covers_exactly_what_requires_a_gradient(name: str, make_encoder) -> None:
    stage = make_stages(make_encoder)[name]
    groups = stage.trainable()
    named = [(key, p) for group in groups for key, p in group.parameters.items()]
    expected = {key: p for key, p in stage.named_parameters() if p.requires_grad}
    assert len(named) == len(expected) and all(expected[key] is p for key, p in named)
    for group in groups:
        assert all(key.startswith("image_losses.head.") == group.new for key in group.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name: str, make_encoder) -> None:
    """A parameter that requires a gradient and never gets one stalls DDP and wastes ZeRO's memory."""
    stage = make_stages(make_encoder)[name]
    gradients = sgd_step(stage)
    assert set(gradients) == {key for group in stage.trainable() for key in group.parameters}
    # The attention's key bias has none in theory; the rest must move.
    assert all(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("pretrain_locked_text", ("encoder.text.",)),
        ("i2i", ("encoder.text.", "encoder.logit_scale")),
        ("i2i_text_frozen", ("encoder.text.",)),
        ("t2i_frozen", ("encoder.visual.",)),
        ("t2i_queue_frozen", ("encoder.visual.",)),
        ("t2i_fixed", ("encoder.logit_scale",)),
    ],
)
def test_frozen_parts_stay_bit_identical_and_the_rest_moves(name: str, frozen: tuple[str, ...], make_encoder) -> None:
    stage = make_stages(make_encoder)[name]
    before = {key: p.detach().clone() for key, p in stage.named_parameters()}
    gradients = sgd_step(stage)
    for key, parameter in stage.named_parameters():
        is_frozen = key.startswith(frozen)
        assert parameter.equal(before[key]) == is_frozen, key
        assert (key in gradients) != is_frozen, key


def test_a_frozen_tower_with_batch_norm_keeps_its_statistics_and_features(make_encoder) -> None:
    stage = T2IStage(make_encoder("resnet"), TextLoss(), ("visual",))
    image = make_batch()["image_BCHW"]
    with torch.no_grad():
        features = stage.eval().encoder.encode_image(image)
    before = {key: value.clone() for key, value in stage.encoder.visual.state_dict().items()}
    sgd_step(stage)
    assert all(value.equal(before[key]) for key, value in stage.encoder.visual.state_dict().items())
    with torch.no_grad():
        assert stage.eval().encoder.encode_image(image).equal(features)


def test_the_same_tower_unfrozen_does_move(make_encoder) -> None:
    """What the test above would see if freezing did nothing."""
    stage = T2IStage(make_encoder("resnet"), TextLoss())
    before = {key: value.clone() for key, value in stage.encoder.visual.state_dict().items()}
    sgd_step(stage)
    after = stage.encoder.visual.state_dict()
    assert not after["bn1.running_mean"].equal(before["bn1.running_mean"])
    assert not after["conv1.weight"].equal(before["conv1.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_towers_are_in_evaluation_mode_however_often_the_stage_is_switched(name: str, make_encoder) -> None:
    stage = make_stages(make_encoder)[name]
    for _ in range(2):
        assert stage.train() is stage
        for tower in ("visual", "text"):
            modules = list(getattr(stage.encoder, tower).modules())
            assert all(module.training == (tower not in stage.frozen) for module in modules)
        stage.eval()
        assert not any(module.training for module in stage.modules())


# The losses of each stage


def features_of(stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    output = stage.encoder(make_batch()["image_BCHW"], make_batch()["token_BL"])
    return output.image_features, output.text_features, output.log_scale


def test_pretrain_has_own_pair_targets_whatever_the_identities(make_encoder) -> None:
    stage = PretrainStage(make_encoder(), PretrainLoss())
    torch.testing.assert_close(stage(make_batch())["loss"], contrastive_loss(*features_of(stage)))


def test_t2i_has_the_targets_of_its_setting(make_encoder) -> None:
    pid = make_batch()["pid_B"]
    identity = T2IStage(make_encoder(), TextLoss(positives="identity"))
    pair = T2IStage(make_encoder(), TextLoss(positives="pair"))
    torch.testing.assert_close(identity(make_batch())["loss"], contrastive_loss(*features_of(identity), pid))
    torch.testing.assert_close(pair(make_batch())["loss"], contrastive_loss(*features_of(pair)))
    assert identity(make_batch())["loss"] != pair(make_batch())["loss"]


def test_i2i_is_the_weighted_sum_of_its_losses(make_encoder) -> None:
    weights = I2ILoss(identity_weight=0.7, triplet_weight=2.0, text_weight=0.5, label_smoothing=0.2, triplet_margin=0.4)
    stage = I2IStage(make_encoder(), weights, run=RUN).train()
    image, text, scale = features_of(stage)
    pid = make_batch()["pid_B"]
    parts = {
        "identity": identity_loss(stage.image_losses.head(image), pid, 0.2),
        "triplet": batch_hard_triplet_loss(image, pid, 0.4),
        "contrastive": contrastive_loss(image, text, scale, pid),
    }
    output = stage(make_batch())
    for key, value in parts.items():
        torch.testing.assert_close(output["metrics"][key], value)
    torch.testing.assert_close(
        output["loss"], 0.7 * parts["identity"] + 2 * parts["triplet"] + 0.5 * parts["contrastive"]
    )


def test_i2i_without_text_supervision_needs_no_tokens(make_encoder) -> None:
    stage = I2IStage(make_encoder(), I2ILoss(), run=RUN)
    output = stage({key: make_batch()[key] for key in ("image_BCHW", "pid_B")})
    assert set(output["metrics"]) == {"identity", "triplet"}


# From the configuration


def test_every_kind_of_the_configuration_has_a_stage(make_encoder) -> None:
    assert set(STAGES) == set(STAGE_CONFIGS)
    words = WordTokenizer(["a", "person"], 8, 50)
    classes = {
        "pretrain": PretrainStage,
        "prompt": PromptStage,
        "identity_prompt": IdentityPromptStage,
        "i2i": I2IStage,
        "t2i": T2IStage,
    }
    for kind in STAGES:
        run = Surroundings(identities=IDENTITIES, tokenizer=words)
        settings = {"loss": IdentityPromptLoss(tokens=1, template="a {} person")} if kind == "identity_prompt" else {}
        assert type(build_stage(stage_config(kind, **settings), make_encoder(), run)) is classes[kind]


def test_settings_of_the_configuration_reach_the_stage(make_encoder) -> None:
    i2i = build_stage(
        stage_config("i2i", loss=I2ILoss(text_weight=1.0), freeze=["text"]), make_encoder(), Surroundings(identities=9)
    )
    assert isinstance(i2i, I2IStage)
    assert (i2i.image_losses.head.classifier.out_features, i2i.setting.text_weight, i2i.frozen) == (9, 1.0, ("text",))
    t2i = build_stage(stage_config("t2i", loss=TextLoss(positives="pair"), freeze=["visual"]), make_encoder(), RUN)
    assert isinstance(t2i, T2IStage) and (t2i.text_losses.setting.positives, t2i.frozen) == ("pair", ("visual",))
    assert build_stage(
        stage_config("pretrain", freeze=["text"]), make_encoder(), Surroundings(identities=9)
    ).frozen == ("text",)


@pytest.mark.parametrize(
    ("kind", "trunk", "trained"), [("t2i", "text_trunk", "text.text_projection"), ("i2i", "visual_trunk", "projection")]
)
def test_of_a_frozen_trunk_the_last_map_trains(make_encoder, kind: str, trunk: str, trained: str) -> None:
    tower = trunk.removesuffix("_trunk")
    stage = build_stage(stage_config(kind, freeze=[trunk]), make_encoder(), RUN).train()
    names = {name for name, p in getattr(stage.encoder, tower).named_parameters() if p.requires_grad}
    assert names and all(f"{tower}.{name}".startswith((trained, f"{tower}.{trained}")) for name in names)
    assert not getattr(stage.encoder, tower).training and stage.frozen == (("text",) if kind == "i2i" else ())
    if kind == "t2i":
        assert stage.encoder.visual.training and all(p.requires_grad for p in stage.encoder.visual.parameters())


def test_a_trunk_without_a_last_map_cannot_be_frozen(make_encoder) -> None:
    encoder = make_encoder()
    encoder.text.text_projection = None
    with pytest.raises(UserError, match="freeze: text_trunk: this tower has no last linear map"):
        build_stage(stage_config("t2i", freeze=["text_trunk"]), encoder, RUN)


def test_what_no_pretrained_weights_exist_for_trains_as_new(tmp_path: Path) -> None:
    vision = {"image_size": 64, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "vit.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    prompts = PromptConfig(visual_depth=1, text_depth=1)
    model = ModelConfig(architecture=str(tmp_path / "vit.json"), image_size=(64, 32), prompts=prompts, projection=6)
    stage = build_stage(stage_config("t2i", train_prompts=True), build_dual_encoder(model), RUN)
    old, new = stage.trainable()
    assert (old.new, new.new) == (False, True) and "encoder.visual.proj" in old.parameters
    heads = {f"encoder.{tower}.projection_head.{part}" for tower in ("visual", "text") for part in ("weight", "bias")}
    assert set(new.parameters) == {"encoder.visual.prompts", "encoder.text.prompts", *heads}
