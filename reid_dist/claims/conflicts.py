"""Arms and claims of the conflict between image and text queries: C1-C4 (methods.md card 1), H2 (card 4)."""

from collections.abc import Mapping
from typing import Any

from reid_dist.claims.arms import CAPTIONED, GENERIC, IMAGES, Arm, Claim, Row, Task

# One temperature for all: a learned one would confound joint against decoupled training (methods.md 1.6). One sampler
# too: four images of each person, in every arm with identities.
TEMPERATURE = 0.07
BY_IDENTITY = {"sampler": "identity", "images_per_identity": 4}
# Rules replace the settings by kind: what has one dimension must then be kept from decay by name, as in the other arms.
NO_DECAY = {"contains": ["bias", "norm", "ln_", "class_embedding", "logit_scale"], "weight_decay": 0.0}
CAPTIONS = {"train": [CAPTIONED], **BY_IDENTITY}
PLAIN_IMAGES = {"train": [IMAGES], **BY_IDENTITY}
BOTH = {"train": [IMAGES, CAPTIONED], "weights": [1, 1], **BY_IDENTITY}
ALL: tuple[Task, ...] = ("t2i", "i2i", "unseen")


def text_loss(positives: str = "identity", **settings: Any) -> dict[str, Any]:
    """A contrastive text loss: `identity`: all captions of a person are right; `pair`: only the image's own."""
    return {"temperature": TEMPERATURE, "positives": positives, **settings}


def text_stage(positives: str = "identity", **settings: Any) -> dict[str, Any]:
    """A stage of kind t2i that trains both towers."""
    return {"kind": "t2i", "data": CAPTIONS, "loss": text_loss(positives), **settings}


def joint_stage(text: Mapping[str, Any] | None = None, rows: str = "uncaptioned", **settings: Any) -> dict[str, Any]:
    """Image losses on images without captions (or on all), text losses on those with: half of the batch each."""
    loss = {"text_weight": 1.0, "image_rows": rows, "text": text or text_loss()}
    return {"kind": "i2i", "data": BOTH, "loss": loss, **settings}


def _watched(stage: dict[str, Any]) -> dict[str, Any]:
    return {**stage, "loss": {**stage["loss"], "conflict_every": 25}}


FROZEN = text_stage(freeze=["visual"])
FROZEN_PAIR = text_stage("pair", freeze=["visual"])
_SHARED_CLASSIFIER = text_loss(contrastive_weight=0.0, identity_weight=1.0, classifier="shared")
_ANCHORS = joint_stage(freeze=["text"])
_IDENTITIES = {"kind": "i2i", "data": BOTH}

_ARMS = (
    Arm("base", "generic pairs and people of another world: stands for CLIP", {
        "kind": "pretrain", "data": {"train": [GENERIC]}, "loss": {"temperature": TEMPERATURE},
    }, length=8, weights=None, scored=ALL, fast=True),
    # One task alone
    Arm("i2i", "I2I only", {"kind": "i2i", "data": PLAIN_IMAGES}, scored=ALL, fast=True),
    Arm("i2i-half", "I2I only, half as long", {"kind": "i2i", "data": PLAIN_IMAGES}, length=0.5),
    Arm("i2i-double", "I2I only, twice as long", {"kind": "i2i", "data": PLAIN_IMAGES}, length=2),
    Arm("t2i", "T2I only", text_stage(), scored=ALL, fast=True),
    Arm("t2i-double", "T2I only, twice as long", text_stage(), length=2, scored=(*ALL, "reranked")),
    Arm("t2i-pair", "T2I only, pairwise", text_stage("pair"), scored=ALL),
    Arm("t2i-pair-double", "T2I only, pairwise, twice as long", text_stage("pair"), length=2, scored=ALL),
    # Joint; at the length of one stage it is also the first stage with textual supervision (T1)
    Arm("joint", "joint, or T1: I2I with a text tower that trains", joint_stage(), fast=True),
    Arm("joint-double", "joint, twice as long", _watched(joint_stage()), length=2),
    Arm("joint-pair", "joint, pairwise", joint_stage(text_loss("pair"))),
    Arm("joint-pair-double", "joint, pairwise, twice as long", _watched(joint_stage(text_loss("pair"))), length=2),
    Arm("joint-dual", "joint, twice as long, a token for each task", joint_stage(), {"dual_token": True}, length=2),
    # The second stage: text, with the image tower frozen or not
    Arm("base-text", "no I2I, then text with vision frozen", FROZEN, weights="base", scored=ALL),
    Arm("i2i-text", "I2I, then text with vision frozen", FROZEN, weights="i2i", scored=ALL, fast=True),
    Arm("i2i-text-long", "the same, text half as long again", FROZEN, length=1.5, weights="i2i"),
    Arm("i2i-pair-text", "I2I, then pairwise text with vision frozen", FROZEN_PAIR, weights="i2i"),
    Arm("i2i-tune", "I2I, then T2I with everything training", text_stage(), weights="i2i", scored=ALL, fast=True),
    Arm("i2i-pair-text-long", "the same, text half as long again", FROZEN_PAIR, length=1.5, weights="i2i"),
    Arm("i2i-pair-tune", "I2I, then pairwise T2I with everything training", text_stage("pair"), weights="i2i",
        scored=ALL),
    Arm("joint-text", "joint, then text with vision frozen", FROZEN, weights="joint", fast=True),
    Arm("joint-tune", "joint, then T2I with everything training", text_stage(), weights="joint"),
    Arm("joint-pair-text", "pairwise joint, then pairwise text with vision frozen", FROZEN_PAIR,
        weights="joint-pair"),
    # Not confounded: each image tower with each text tower
    Arm("joint-cold-text", "vision of joint with the text tower of base, then text", FROZEN, visual="joint"),
    Arm("joint-pair-cold-text", "the same, pairwise in both", FROZEN_PAIR, visual="joint-pair"),
    Arm("i2i-warm-text", "vision of i2i with the text tower pre-fitted in joint, then text", FROZEN,
        weights="joint", visual="i2i"),
    # The same images with and without captions
    Arm("people", "I2I losses on the people of both sets", _IDENTITIES),
    Arm("people-text", "the same, then text with vision frozen", FROZEN, weights="people"),
    Arm("people-joint", "I2I losses on the people of both sets, and captions", joint_stage(rows="all")),
    Arm("people-joint-text", "the same, then text with vision frozen", FROZEN, weights="people-joint"),
    # Other forms of textual supervision
    Arm("anchors", "T2: I2I with a frozen text tower", _ANCHORS),
    Arm("anchors-text", "the same, then text with vision frozen", FROZEN, weights="anchors"),
    Arm("classifier", "T3: I2I with one identity classifier for images and captions",
        joint_stage(_SHARED_CLASSIFIER, rows="all")),
    Arm("classifier-text", "the same, then text with vision frozen", FROZEN, weights="classifier"),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ARMS}

_IDENTITY, _PAIR = "identity-aware text targets", "pairwise text targets"


def _rows(setting: str, *compared: tuple[str, str, Task], decides: bool = True) -> tuple[Row, ...]:
    return tuple(Row(setting, better, worse, task, decides=decides) for better, worse, task in compared)


_CARD_1 = "arXiv 2606.02242"
_DIFFERS = (
    "The paper's data, losses and tables are unknown; here a small image tower starts from generated pairs instead of"
    " CLIP, trains for minutes, and captions name attributes of a cartoon."
)
CLAIMS = (
    Claim("C1", "Training both tasks in one stage is worse than training for one of them, on at least one.", _CARD_1,
        "any", (
            *_rows(_IDENTITY, ("i2i-double", "joint-double", "i2i"), ("t2i-double", "joint-double", "t2i"),
                ("i2i", "joint-double", "i2i"), ("t2i", "joint-double", "t2i")),
            *_rows(_PAIR, ("i2i-double", "joint-pair-double", "i2i"), ("t2i-pair-double", "joint-pair-double", "t2i"),
                ("i2i", "joint-pair-double", "i2i"), ("t2i-pair", "joint-pair-double", "t2i")),
        ), _DIFFERS),
    Claim("C2", "I2I first, then text with the image tower frozen, serves both tasks better than joint training.",
        _CARD_1, "all", (
            *_rows(_IDENTITY, ("i2i-text", "joint-double", "i2i"), ("i2i-text", "joint-double", "t2i"),
                ("i2i-text", "joint", "i2i"), ("i2i-text", "joint", "t2i")),
            *_rows(_PAIR, ("i2i-pair-text", "joint-pair-double", "i2i"), ("i2i-pair-text", "joint-pair-double", "t2i"),
                ("i2i-pair-text", "joint-pair", "i2i"), ("i2i-pair-text", "joint-pair", "t2i")),
            *_rows("text in both stages", ("joint-text", "joint-double", "i2i"), ("joint-text", "joint-double", "t2i")),
            *_rows("forgetting, where vision is not frozen", ("i2i", "i2i-tune", "i2i"), ("joint", "joint-tune", "i2i"),
                ("i2i-tune", "i2i-text", "t2i"), ("joint-tune", "joint-text", "t2i"), decides=False),
        ), _DIFFERS),
    Claim("C3", "I2I training first helps T2I, on new people and on new cameras.", _CARD_1, "all", (
            *_rows(_IDENTITY, ("i2i-tune", "t2i-double", "t2i"), ("i2i-tune", "t2i-double", "unseen"),
                ("i2i-tune", "t2i", "t2i"), ("i2i-tune", "t2i", "unseen")),
            *_rows(_PAIR, ("i2i-pair-tune", "t2i-pair-double", "t2i"), ("i2i-pair-tune", "t2i-pair-double", "unseen"),
                ("i2i-pair-tune", "t2i-pair", "t2i"), ("i2i-pair-tune", "t2i-pair", "unseen")),
            *_rows("image tower frozen", ("i2i-text", "base-text", "t2i"), ("i2i-text", "base-text", "unseen")),
        ), _DIFFERS),
    Claim("C4", "Textual supervision while the image tower trains improves both tasks.", _CARD_1, "all", (
            # Both second stages begin with the text tower of base: one that the first stage trained would decide alone.
            *_rows(_IDENTITY, ("joint", "i2i", "i2i"), ("joint-cold-text", "i2i-text", "t2i"),
                ("joint", "i2i-half", "i2i"), ("joint-cold-text", "i2i-text-long", "t2i")),
            *_rows(_PAIR, ("joint-pair", "i2i", "i2i"), ("joint-pair-cold-text", "i2i-pair-text", "t2i"),
                ("joint-pair", "i2i-half", "i2i"), ("joint-pair-cold-text", "i2i-pair-text-long", "t2i")),
            *_rows("same images, with and without captions", ("people-joint", "people", "i2i"),
                ("people-joint-text", "people-text", "t2i")),
            *_rows("both text towers trained before the second stage", ("joint-text", "i2i-warm-text", "t2i")),
            *_rows("text tower as the first stage leaves it, which mixes two causes", ("joint-text", "i2i-text", "t2i"),
                ("joint-text", "i2i-text-long", "t2i"), ("joint-pair-text", "i2i-pair-text", "t2i"), decides=False),
            *_rows("frozen text tower (T2)", ("anchors", "i2i", "i2i"), ("anchors-text", "i2i-text", "t2i")),
            *_rows("shared classifier (T3)", ("classifier", "people", "i2i"),
                ("classifier-text", "people-text", "t2i")),
        ), _DIFFERS),
    Claim("H2", "In joint training, a class token for each task is better than one for both.", "arXiv 2511.13575",
        "all", _rows(_IDENTITY, ("joint-dual", "joint-double", "i2i"), ("joint-dual", "joint-double", "t2i")),
        "HPL starts from CLIP pre-trained on people and adds a class token to a ViT, and prompts, which are not here;"
        " in a convolutional tower, which has no tokens, a second projection takes the place of the second token."),
)  # fmt: skip
