"""The heart: N ranks under every ZeRO stage equal one plain process on the concatenated batch, in fp32.

The model is the shipped quickstart model. For every stage, world size and ZeRO stage: the loss, every gradient and
the parameters after 3 SGD steps agree within 1e-5 relative norm; with AdamW, which amplifies rounding where gradients
vanish, the loss curve does. Variants of a stage differ from it in the loss or in what trains: on two ranks they run
under every ZeRO stage, on one and four under 1, the shipped one, and 3, which splits all.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from reid_dist.config import I2ILoss, ModelConfig, OptimizerConfig, PretrainLoss, TextLoss
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages.base import Stage
from reid_dist.stages.contract import Surroundings
from reid_dist.stages.i2i import I2IStage
from reid_dist.stages.pretrain import PretrainStage
from reid_dist.stages.t2i import T2IStage
from tests.distributed.parity import IDENTITIES, SGD, assert_close, assert_equal, reference, train

ARCHITECTURE = str(Path(__file__).parents[2] / "configs" / "models" / "row_conv_tiny.json")
ADAMW = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.02)
STAGE_NAMES = ("pretrain", "i2i", "t2i")
VARIANTS = ("i2i_text", "t2i_frozen", "t2i_pair")
ZERO_STAGES = (0, 1, 2, 3)
EVERY = [(name, zero_stage) for name in (*STAGE_NAMES, *VARIANTS) for zero_stage in ZERO_STAGES]
FEWER = [(name, zero_stage) for name, zero_stage in EVERY if name in STAGE_NAMES or zero_stage in (1, 3)]
# Whether ZeRO's AdamW is torch's does not depend on the loss: each loss has two ZeRO stages, each of them three losses.
HALF = [(name, zero_stage) for i, (name, zero_stage) in enumerate(EVERY) if (i // 4 + zero_stage) % 2 == 0]


def make_stage(name: str) -> Stage:
    torch.manual_seed(1)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    if name == "pretrain":
        return PretrainStage(encoder, PretrainLoss())
    if name.startswith("i2i"):
        loss = I2ILoss(text_weight=0.5 if name == "i2i_text" else 0.0)
        return I2IStage(encoder, loss, run=Surroundings(identities=IDENTITIES))
    return T2IStage(
        encoder,
        TextLoss(positives="pair" if name == "t2i_pair" else "identity"),
        freeze=("visual",) if name == "t2i_frozen" else (),
    )


def train_all(cases: list[tuple[str, int]], optimizer_config: OptimizerConfig) -> dict:
    return {
        (name, zero_stage): train(partial(make_stage, name), zero_stage, optimizer_config) for name, zero_stage in cases
    }


# The identity loss sees features through batch statistics and the triplet loss sees differences, so neither depends on
# a shift of all features: this gradient is zero in theory, and both sides hold rounding.
ZERO_IN_THEORY = {"i2i": {"encoder.visual.projection.bias"}}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict]:
    return {name: reference(partial(make_stage, name), SGD) for name in (*STAGE_NAMES, *VARIANTS)}


@pytest.mark.parametrize(("world", "cases"), [(1, FEWER), (2, EVERY), pytest.param(4, FEWER, marks=pytest.mark.long)])
def test_loss_gradients_and_parameters_equal_a_single_process(
    world: int, cases: list[tuple[str, int]], expected: dict[str, dict], run_ranks
) -> None:
    found = run_ranks(world, train_all, cases, SGD)[0]
    assert [*found] == cases
    for (name, zero_stage), result in found.items():
        what = f"{name}, {world} ranks, ZeRO {zero_stage}:"
        assert_equal(result, expected[name], what, ZERO_IN_THEORY.get(name, set()))


def test_adamw_loss_curve_equals_a_single_process(run_ranks) -> None:
    expected = {name: reference(partial(make_stage, name), ADAMW) for name in (*STAGE_NAMES, *VARIANTS)}
    for (name, zero_stage), result in run_ranks(2, train_all, HALF, ADAMW)[0].items():
        assert result["losses"] == pytest.approx(expected[name]["losses"], rel=1e-4), f"{name}, ZeRO {zero_stage}"


def test_a_gather_without_gradient_would_be_found(expected: dict[str, dict], run_ranks, monkeypatch) -> None:
    """The test above can fail: with features of other ranks detached, the gradients are wrong."""
    from reid_dist.losses import contrastive

    monkeypatch.setattr(contrastive, "all_gather_with_grad", contrastive.all_gather)
    found = run_ranks(2, train, partial(make_stage, "pretrain"), 1, SGD)[0]
    with pytest.raises(AssertionError, match="gradient of"):
        assert_close(found["gradients"], expected["pretrain"]["gradients"], "gradient of")
