"""The stages of the published methods: two ranks under ZeRO equal one plain process on the concatenated batch.

ZeRO 0, which splits nothing, and 3, which splits weights too, for every one of them; 1 and 2, which split the same flat
buffers, for every second one each (test_method_recipes.py trains every recipe under all four).
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from reid_dist.config import (
    I2ILoss,
    IdentityPromptLoss,
    ModelConfig,
    PretrainLoss,
    PromptConfig,
    TextLoss,
    WordGruConfig,
)
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.identity_prompt import IdentityPromptStage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.prompt import PromptStage
from reid_dist.stages.t2i import T2IStage
from tests.distributed.parity import IDENTITIES, SGD, assert_equal, make_batch, reference, train

MODELS = Path(__file__).parents[2] / "configs" / "models"
PROMPTS = PromptConfig(visual_length=2, text_length=3, visual_depth=3, text_depth=1)
SDM = {"contrastive_weight": 0, "sdm_weight": 1, "temperature": 0.1}
IRRA = TextLoss(**SDM, identity_weight=1, mlm_weight=1, mlm_depth=2)
TEXTREID = TextLoss(
    temperature=0.07, alignment_weight=0.1, identity_weight=2, classifier="normalised", label_smoothing=0.1
)
JOINT = TextLoss(**SDM, identity_weight=1)
SHARED = TextLoss(contrastive_weight=0, identity_weight=1, classifier="shared")
RUN = Surroundings(16, identities=IDENTITIES)
NAMES = ("irra", "textreid", "joint", "joint_all_rows", "joint_shared", "joint_dual_token", "prompt", "prompted_t2i")
NAMES += ("prompts_and_encoders", "identity_prompt", "sigmoid")

# As in test_parity.py: these losses do not see a shift of all features.
ZERO_IN_THEORY = {
    "joint_shared": {"encoder.visual.projection.bias", "encoder.text.ln_final.bias"},
    "joint_dual_token": {"encoder.visual.projection_i2i.bias"},
}


def make_stage(name: str, vocabulary: Path) -> Stage:
    torch.manual_seed(1)
    prompted = name.startswith("prompt")
    vit = MODELS / ("vit_tiny.json" if prompted or name == "identity_prompt" else "row_conv_tiny.json")
    model = ModelConfig(
        architecture=str(vit),
        image_size=(64, 32),
        prompts=PROMPTS if prompted else None,
        dual_token=name == "joint_dual_token",
        word_gru=WordGruConfig(features=16, hidden=12, context_length=40) if name == "textreid" else None,
        vocabulary=vocabulary if name == "textreid" else None,
        projection=24 if name == "textreid" else None,
    )
    encoder = build_dual_encoder(model)
    if name == "irra":
        return T2IStage(encoder, IRRA, run=RUN)
    if name == "textreid":
        return T2IStage(encoder, TEXTREID, run=RUN)
    if name.startswith("joint"):
        rows = "all" if name == "joint_all_rows" else "uncaptioned"
        text = SHARED if name == "joint_shared" else JOINT
        return I2IStage(encoder, I2ILoss(text_weight=0.5, image_rows=rows, text=text), run=RUN)
    if name == "prompt":
        return PromptStage(encoder, TextLoss(positives="pair", temperature=0.1), RUN)
    if name == "prompted_t2i":
        return T2IStage(encoder, JOINT, run=RUN)
    if name == "prompts_and_encoders":
        return T2IStage(encoder, JOINT, run=RUN, train_prompts=True)
    if name == "identity_prompt":
        words = WordTokenizer(["a", "photo", "of", "person"], 40, 512)
        return IdentityPromptStage(
            encoder, IdentityPromptLoss(), Surroundings(16, identities=IDENTITIES, tokenizer=words)
        )
    return PretrainStage(encoder, PretrainLoss(objective="sigmoid"))


def batches(name: str, step: int) -> dict[str, torch.Tensor]:
    """Captions of every other row for the joint stages, hidden words for IRRA."""
    batch = make_batch(step)
    if name == "irra":
        hidden = (batch["token_BL"] > 0) & (torch.arange(40) % 5 == 1)
        batch["masked_token_BL"] = batch["token_BL"].masked_fill(hidden, 1)
        batch["masked_label_BL"] = batch["token_BL"].masked_fill(~hidden, -100)
    if name == "textreid":
        batch["token_BL"] = batch["token_BL"] % 60
    if name.startswith("joint"):
        captioned = torch.arange(16) % 2 == 1
        batch |= {"captioned_B": captioned, "token_BL": batch["token_BL"][captioned]}
    return batch


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "vocabulary.txt"
    path.write_text("".join(f"word{number}\n" for number in range(80)))
    return path


def train_all(vocabulary: Path) -> dict:
    return {
        (name, zero): train(partial(make_stage, name, vocabulary), zero, SGD, partial(batches, name))
        for place, name in enumerate(NAMES)
        for zero in (0, 1 + place % 2, 3)
    }


def test_loss_gradients_and_parameters_equal_a_single_process(vocabulary: Path, run_ranks) -> None:
    expected = {name: reference(partial(make_stage, name, vocabulary), SGD, partial(batches, name)) for name in NAMES}
    problems = []
    for (name, zero), result in run_ranks(2, train_all, vocabulary)[0].items():
        try:
            assert_equal(result, expected[name], f"{name}, ZeRO {zero}:", ZERO_IN_THEORY.get(name, set()))
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)
