"""The text-to-image stage with IRRA's settings is IRRA: value and every gradient (methods.md card A)."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.config import ModelConfig, TextLoss
from reid_dist.distributed import mean_over_ranks, rank, world_size
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages import Surroundings
from reid_dist.stages.cached_gradients import first_pass, joint_gradients, surrogate
from reid_dist.stages.t2i import T2IStage
from reid_dist.trainer import INPUTS
from tests.stages.irra_reference import irra_parts

ROWS, IDENTITIES, LENGTH, VOCABULARY, END = 6, 4, 9, 30, 29
LOSS = TextLoss(contrastive_weight=0, sdm_weight=1, identity_weight=1, mlm_weight=1, mlm_depth=2, temperature=0.02)
# Image and text heads; image and text width are those times what is below.
SMALL, LARGE = (12, 1, 2), (128, 3, 1)
WIDTH = 16


@pytest.fixture
def make_stage(tmp_path: Path) -> Callable[..., T2IStage]:
    """`make_stage(seed, (D, image heads, text heads))`, in float64; no bias is 0 and no gain is 1."""

    def make(seed: int, size: tuple[int, int, int], **settings: object) -> T2IStage:
        features, image_heads, text_heads = size
        vision = {"patch_size": 8, "width": WIDTH * image_heads, "head_width": WIDTH, "layers": 2, "image_size": 32}
        text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH * text_heads, "heads": text_heads}
        architecture = {
            "embed_dim": features,
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": {**text, "layers": 2},
        }
        path = tmp_path / f"{features}.json"
        path.write_text(json.dumps(architecture))
        torch.manual_seed(seed)
        encoder: DualEncoder = build_dual_encoder(ModelConfig(architecture=str(path), image_size=(32, 16)))
        loss = LOSS.model_copy(update=settings)
        stage = T2IStage(encoder, loss, run=Surroundings(ROWS, identities=IDENTITIES)).double().train()
        for parameter in stage.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        stage.encoder.logit_scale.data.fill_(-math.log(0.02))
        return stage

    return make


def make_batch(seed: int) -> dict[str, Tensor]:
    """Normalised images, so that nothing is rounded; captions of different lengths, some with hidden words."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(3, END, (ROWS, LENGTH), generator=generator)
    for row, end in enumerate(torch.randint(3, LENGTH, (ROWS,), generator=generator).tolist()):
        token[row, end] = END
        token[row, end + 1 :] = 0
    hidden = (torch.rand(token.shape, generator=generator) < 0.4) & (token > 0) & (token < END)
    hidden[:, 1] |= ~hidden.any(1)
    hidden[-1] = False  # an uneven number for each rank
    masked = torch.where(hidden & (torch.rand(token.shape, generator=generator) < 0.8), 1, token)
    return {
        "image_BCHW": torch.randn(ROWS, 3, 32, 16, generator=generator, dtype=torch.float64),
        "token_BL": token,
        "masked_token_BL": masked,
        "masked_label_BL": token.masked_fill(~hidden, -100),
        "pid_B": torch.randint(0, IDENTITIES, (ROWS,), generator=generator),
        "sample_id_B": torch.arange(ROWS),
    }


def reference(stage: T2IStage, batch: dict[str, Tensor], size: tuple[int, int, int]) -> dict[str, Tensor]:
    # The temperature is kept as the fp32 logarithm of its inverse.
    temperature = math.exp(-float(torch.tensor(-math.log(0.02))))
    in_place = stage.text_losses.setting.mask_for == "all"
    return irra_parts(dict(stage.named_parameters()), batch, size[1:], temperature, in_place)


def gradients(stage: T2IStage, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(("seed", "mask_for"), [(0, "mlm"), (1, "all"), (2, "all")])
def test_the_stage_equals_the_published_formulas(
    make_stage: Callable, seed: int, mask_for: str, size: tuple[int, int, int]
) -> None:
    stage, batch = make_stage(seed, size, mask_for=mask_for), make_batch(seed)
    output, expected = stage(batch), reference(stage, batch, size)
    for name, value in expected.items():
        torch.testing.assert_close(output["metrics"][name], value, rtol=1e-10, atol=1e-12)
    total = expected["sdm"] + expected["identity"] + expected["mlm"]
    torch.testing.assert_close(output["loss"], total, rtol=1e-10, atol=1e-12)
    found, wanted = gradients(stage, output["loss"]), gradients(stage, total)
    assert "encoder.logit_scale" not in found  # the temperature is fixed
    assert all(bool(gradient.any()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_weights_of_the_losses(make_stage: Callable) -> None:
    stage, batch = make_stage(0, SMALL, sdm_weight=0.5, identity_weight=2.0, mlm_weight=3.0), make_batch(0)
    parts = reference(stage, batch, SMALL)
    expected = 0.5 * parts["sdm"] + 2 * parts["identity"] + 3 * parts["mlm"]
    torch.testing.assert_close(stage(batch)["loss"], expected, rtol=1e-10, atol=1e-12)


def _on_this_rank(stage: T2IStage, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    rows = ROWS // world_size()
    own = slice(rank() * rows, (rank() + 1) * rows)
    loss = stage({name: x[own] for name, x in batch.items()})["loss"]
    found = gradients(stage, loss)
    return mean_over_ranks(loss.detach()), {name: mean_over_ranks(gradient) for name, gradient in found.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(make_stage: Callable, run_ranks: Callable, world: int) -> None:
    stage, batch = make_stage(4, SMALL, mask_for="all"), make_batch(4)
    expected = stage(batch)["loss"]
    wanted = gradients(stage, expected)
    for loss, found in run_ranks(world, _on_this_rank, stage, batch):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mask_for", ["mlm", "all"])
def test_cached_micro_batches_equal_the_whole_batch(make_stage: Callable, mask_for: str) -> None:
    """Also where micro-batches have different numbers of hidden words."""
    stage, batch = make_stage(5, SMALL, mask_for=mask_for), make_batch(5)
    expected = stage(batch)["loss"]
    wanted = gradients(stage, expected)
    parts = [{name: x[first : first + 2] for name, x in batch.items()} for first in range(0, ROWS, 2)]
    passes = [first_pass(stage, part) for part in parts]
    known = [{name: x for name, x in part.items() if name not in INPUTS} for part in parts]
    cached = joint_gradients(stage, known, passes)
    for index, (part, first) in enumerate(zip(parts, passes, strict=True)):
        (surrogate(stage, part, first, cached, index) / len(parts)).backward()
    torch.testing.assert_close(cached.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    for name, parameter in stage.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-10)
