"""The text transformer: open_clip's own bit for bit, prompts, end tokens and inserted embeddings.

Shape suffixes: B batch, L tokens, M inserted, W width, D feature size.
"""

import copy
from typing import Any

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.text_transformer import TextTower
from tests.models.transformer_by_hand import norm, run_blocks

HEADS, LAYERS, CONTEXT, START, END = 2, 3, 9, 28, 29
SIGLIP = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}


def plain(**settings: Any) -> TextTransformer:
    """open_clip's tower for 40 words, with no weight at zero or one."""
    torch.manual_seed(0)
    base = {"context_length": CONTEXT, "vocab_size": 40, "width": 12, "heads": HEADS, "layers": LAYERS}
    tower = TextTransformer(**{**base, "mlp_ratio": 2.0, "output_dim": 5, **settings})
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return tower


def captions(*lengths: int) -> Tensor:
    """Start, random words, end, padding: so many tokens without the padding."""
    generator = torch.Generator().manual_seed(1)
    token_BL = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in zip(token_BL, lengths, strict=True):
        row[:length] = torch.randint(1, 20, (length,), generator=generator)
        row[0], row[length - 1] = START, END
    return token_BL


def by_hand(tower: TextTower, token_L: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Features of the end token, and of every token."""
    weights = {name: value.detach() for name, value in tower.state_dict().items()}
    embedded = [
        weights["token_embedding.weight"][t] + weights["positional_embedding"][i] for i, t in enumerate(token_L)
    ]
    first, rest = run_blocks(embedded[:1], embedded[1:], weights, LAYERS, HEADS, causal=True)
    outputs = [norm(x, weights, "ln_final") @ weights["text_projection"] for x in first + rest]
    return outputs[token_L.index(END)], outputs


VARIANTS: list[dict[str, Any]] = [
    {},
    {"pool_type": "eos", "eos_id": END},
    {"pool_type": "first"},
    SIGLIP,
    {"pool_type": "last", "no_causal_mask": True, "use_pad_mask": True},
    {"embed_cls": True},
    {"embed_cls": True, "correct_cls_mask": True, "proj_type": "none"},
    {"ls_init_value": 0.1, "qk_norm": True},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_without_prompts_features_and_gradients_are_open_clip_s_bit_for_bit(settings: dict, training: bool) -> None:
    expected = plain(**settings).train(training)
    tower = TextTower(copy.deepcopy(expected)).train(training)
    token_BL = captions(9, 4, 3)
    assert list(tower.state_dict()) == list(expected.state_dict())
    features = tower(token_BL)
    assert features.equal(expected(token_BL))
    features.square().sum().backward()
    expected(token_BL).square().sum().backward()
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        assert parameter.grad is None or parameter.grad.equal(gradients[name]), name


@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": END}], ids=str)
@pytest.mark.parametrize(("length", "depth"), [(0, 1), (1, 1), (4, 1), (2, 2), (3, 3)])
def test_prompts_are_those_of_a_forward_by_hand(length: int, depth: int, pool: dict) -> None:
    tower = TextTower(plain(**pool), length, depth).double().eval()
    if tower.prompts is not None:
        assert tower.prompts.shape == (depth, length, 12)
        nn.init.normal_(tower.prompts)
    room = CONTEXT - length
    assert tower.caption_length == room
    token_BL = captions(room, room - 1, 2)[:, :room]
    output = tower(token_BL, details=True)
    assert output.features.equal(tower(token_BL)) and output.i2i_features is None
    for i, token_L in enumerate(token_BL.tolist()):
        features, tokens = by_hand(tower, token_L)
        torch.testing.assert_close(output.features[i], features, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(output.tokens[i], torch.stack(tokens), atol=1e-12, rtol=1e-10)


def test_every_word_sees_the_prompts_and_the_start_token_does_not() -> None:
    tower = TextTower(plain(), 2, 1)
    tokens_BLD = tower(captions(6), details=True).tokens
    for position in range(tower.caption_length):
        (gradient,) = torch.autograd.grad(tokens_BLD[0, position].sum(), tower.prompts, retain_graph=True)
        assert bool(gradient.any()) == (position > 0), position


@pytest.mark.parametrize("length", [0, 2])
def test_no_token_sees_a_later_one(length: int) -> None:
    tower = TextTower(plain(), length, 3 if length else 1).eval()
    token_BL = captions(7)
    before = tower(token_BL, details=True)
    token_BL[0, 4] = 5
    after = tower(token_BL, details=True)
    assert after.tokens[:, :4].equal(before.tokens[:, :4])
    assert not after.tokens[:, 4:].isclose(before.tokens[:, 4:]).all(dim=2).any()


@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": END}], ids=str)
def test_captions_that_leave_no_room_lose_their_last_words_and_keep_their_end(pool: dict) -> None:
    tower = TextTower(plain(**pool), 3, 2).eval()
    token_BL = captions(9, 8, 7, 6, 3)
    token_BL[:, 1] = 35 if pool else 7  # an end token need not be the greatest where it is known
    expected_BL = token_BL[:, :6].clone()
    expected_BL[:4, 5] = END  # the fourth has it there anyhow
    output, expected = tower(token_BL, details=True), tower(expected_BL, details=True)
    assert output.features.equal(expected.features) and output.tokens.equal(expected.tokens)


@pytest.mark.parametrize("length", [0, 2])
@pytest.mark.parametrize("at", [1, 3])
def test_inserted_embeddings_are_words_of_their_own(at: int, length: int) -> None:
    """The same as words whose rows of the embedding they are, one for each place."""
    tower = TextTower(plain(), length, 2).eval()
    token_BL = captions(7, 6)[:, :7]
    inserted_BMW = torch.randn(2, 2, 12, requires_grad=True)
    found = tower(token_BL, details=True, inserted_BMW=inserted_BMW, at=at)
    found.features.sum().backward()
    assert bool(inserted_BMW.grad.any(dim=2).all())
    with torch.no_grad():
        tower.token_embedding.weight[20:24] = inserted_BMW.flatten(0, 1)
    token_BL[:, at : at + 2] = torch.arange(20, 24).view(2, 2)
    expected = tower(token_BL, details=True)
    assert found.features.equal(expected.features) and found.tokens.equal(expected.tokens)


def test_inserted_embeddings_beyond_the_caption_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8\.\.9: a caption has 9 tokens"):
        TextTower(plain())(captions(5), inserted_BMW=torch.zeros(1, 2, 12), at=8)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_passes_through_prompts_frozen_or_not(frozen: bool) -> None:
    tower = TextTower(plain(), 2, 3)
    tower(captions(7, 4)).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in tower.named_parameters()}
    tower.zero_grad()
    tower.prompts.requires_grad_(not frozen)
    tower(captions(7, 4)).square().sum().backward()
    assert (tower.prompts.grad is None) == frozen
    for name, parameter in tower.named_parameters():
        if name != "prompts" or not frozen:
            assert parameter.grad.equal(expected[name]) and bool(parameter.grad.any()), name


def test_recomputed_blocks_give_the_same_gradients() -> None:
    tower = TextTower(plain(), 2, 2)
    gradients = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        tower.zero_grad()
        output = tower(captions(7, 4), details=True)
        (output.features.sum() + output.tokens.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    assert all(gradient.equal(gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("settings", [SIGLIP, {"pool_type": "first"}, {"embed_cls": True}], ids=str)
def test_prompts_want_a_start_and_an_end_token(settings: dict) -> None:
    with pytest.raises(UserError, match=r"model\.prompts\.text_length: .*no start and end"):
        TextTower(plain(**settings), 1, 1)


def test_prompts_leave_room_for_a_word() -> None:
    assert TextTower(plain(), CONTEXT - 3, 1).caption_length == 3
    with pytest.raises(UserError, match=r"model\.prompts\.text_length: 7 prompts leave no word of 9 tokens"):
        TextTower(plain(), CONTEXT - 2, 1)


def test_prompts_beyond_the_last_block_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.prompts\.text_depth: 4, but this tower has 3 blocks"):
        TextTower(plain(), 1, 4)


def test_only_towers_that_append_a_token_give_none() -> None:
    assert TextTower(plain()).gives_tokens and TextTower(plain(**SIGLIP)).gives_tokens
    assert not TextTower(plain(embed_cls=True)).gives_tokens
