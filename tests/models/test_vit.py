"""The vision transformer: open_clip's own bit for bit, prompts and the second class token against a forward by hand.

Shape suffixes: B batch, C channels, H rows, W columns, N tokens, D feature size.
"""

import copy
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.vit import VitTower
from tests.models.transformer_by_hand import norm, run_blocks

HEADS, LAYERS = 2, 3


def plain(**settings: Any) -> VisionTransformer:
    """open_clip's tower for images of 24x16 pixels, six patches, with no weight at zero or one."""
    torch.manual_seed(0)
    base = {"image_size": (24, 16), "patch_size": 8, "width": 12, "layers": LAYERS, "heads": HEADS, "mlp_ratio": 2.0}
    tower = VisionTransformer(**{**base, "output_dim": 5, **settings})
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return tower


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 24, 16, generator=torch.Generator().manual_seed(1))


def by_hand(tower: VitTower, image_CHW: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features, and the features of every token without prompts: class token(s) first."""
    weights = {name: value.detach() for name, value in tower.state_dict().items()}
    first, rest = [], []
    for name in ("class_embedding", "class_embedding_i2i"):
        if name in weights:
            first.append(norm(weights[name] + weights["positional_embedding"][0], weights, "ln_pre"))
    for row in range(3):
        for column in range(2):
            patch = image_CHW[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
            token = weights["conv1.weight"].flatten(1) @ patch + weights["positional_embedding"][1 + 2 * row + column]
            rest.append(norm(token, weights, "ln_pre"))
    first, rest = run_blocks(first, rest, weights, LAYERS, HEADS, causal=False)
    outputs = [norm(x, weights, "ln_post") @ weights["proj"] for x in first + rest]
    return outputs[0], outputs


VARIANTS: list[dict[str, Any]] = [
    {},
    {"pool_type": "avg"},
    {"pool_type": "avg", "final_ln_after_pool": True},
    {"final_ln_after_pool": True, "no_ln_pre": True},
    {"ls_init_value": 0.1},
    {"qk_norm": True},
    {"scale_fc": True, "scale_attn": True},
    {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 1},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_without_prompts_features_and_gradients_are_open_clip_s_bit_for_bit(settings: dict, training: bool) -> None:
    expected = plain(**settings).train(training)
    tower = VitTower(copy.deepcopy(expected)).train(training)
    assert list(tower.state_dict()) == list(expected.state_dict())
    features = tower(images())
    assert features.equal(expected(images()))
    features.square().sum().backward()
    expected(images()).square().sum().backward()
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        assert parameter.grad is None or parameter.grad.equal(gradients[name]), name


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(("length", "depth"), [(0, 1), (1, 1), (4, 1), (2, 2), (3, 3)])
def test_prompts_and_class_tokens_are_those_of_a_forward_by_hand(length: int, depth: int, dual: bool) -> None:
    tower = VitTower(plain(), length, depth, dual).double().eval()
    if tower.class_embedding_i2i is not None:
        nn.init.normal_(tower.class_embedding_i2i)
    if tower.prompts is not None:
        assert tower.prompts.shape == (depth, length, 12)
        nn.init.normal_(tower.prompts)
    image_BCHW = images(2).double()
    output = tower(image_BCHW, details=True)
    assert output.features.equal(tower(image_BCHW))
    assert (output.i2i_features is not None) == dual
    for i, image_CHW in enumerate(image_BCHW):
        features, tokens = by_hand(tower, image_CHW)
        second = [tokens.pop(1)] if dual else []
        torch.testing.assert_close(output.features[i], features, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(output.tokens[i], torch.stack(tokens), atol=1e-12, rtol=1e-10)
        for expected in second:
            torch.testing.assert_close(output.i2i_features[i], expected, atol=1e-12, rtol=1e-10)


def test_a_second_class_token_begins_as_the_first_and_learns_by_itself() -> None:
    tower = VitTower(plain(), dual_token=True)
    output = tower(images(), details=True)
    torch.testing.assert_close(output.i2i_features, output.features, atol=1e-5, rtol=1e-5)
    output.i2i_features.sum().backward()
    assert tower.class_embedding_i2i.grad.abs().min() > 0
    assert not tower.class_embedding_i2i.grad.allclose(tower.class_embedding.grad, rtol=0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_passes_through_prompts_frozen_or_not(frozen: bool) -> None:
    tower = VitTower(plain(), 2, 3)
    tower(images()).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in tower.named_parameters()}
    tower.zero_grad()
    tower.prompts.requires_grad_(not frozen)
    tower(images()).square().sum().backward()
    assert (tower.prompts.grad is None) == frozen
    for name, parameter in tower.named_parameters():
        if name != "prompts" or not frozen:
            assert parameter.grad.equal(expected[name]) and bool(parameter.grad.any()), name


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}], ids=str)
def test_recomputed_blocks_give_the_same_gradients(settings: dict) -> None:
    tower = VitTower(plain(**settings), 2, 2, dual_token=True)
    gradients = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        tower.zero_grad()
        output = tower(images(), details=True)
        (output.features.sum() + output.tokens.square().sum() + output.i2i_features.sin().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    assert all(gradient.equal(gradients[1][name]) for name, gradient in gradients[0].items())


def test_patch_dropout_leaves_out_patches_in_training_only() -> None:
    tower = VitTower(plain(), 2, 3, dual_token=True)
    whole = tower(images())
    tower.set_patch_dropout(0.5)
    seen: list[torch.Size] = []
    tower.transformer.resblocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    output = tower(images(), details=True)
    assert seen == [(3, 2 + 2 + 3, 12)], "class tokens and prompts stay, three of six patches do"
    assert output.tokens.shape == (3, 1 + 3, 5)
    assert not output.features.allclose(whole) and not tower(images()).equal(output.features)
    assert tower.eval()(images()).equal(whole)
    tower.set_patch_dropout(0.0)
    assert tower.train()(images()).equal(whole)
    with pytest.raises(ValueError, match="patch dropout 1"):
        tower.set_patch_dropout(1.0)


@pytest.mark.parametrize("settings", [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 1}])
def test_a_second_class_token_wants_a_first_that_is_the_feature(settings: dict) -> None:
    with pytest.raises(UserError, match=r"model\.dual_token"):
        VitTower(plain(**settings), dual_token=True)


def test_prompts_beyond_the_last_block_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.prompts\.visual_depth: 4, but this tower has 3 blocks"):
        VitTower(plain(), 1, 4)


def test_only_towers_that_pool_by_attention_give_no_tokens() -> None:
    assert VitTower(plain()).gives_tokens
    assert not VitTower(plain(attentional_pool=True, attn_pooler_heads=1)).gives_tokens
