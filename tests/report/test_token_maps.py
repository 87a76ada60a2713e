"""Token maps are the cosines and attentions that the towers themselves compute, word by word and place by place."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_dist.data.tokenizer import OpenClipTokenizer, Tokenizer, WordTokenizer
from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.report.token_maps import (
    attention_map,
    lacks_maps,
    likeness_map,
    place_grid,
    require_maps,
    word_maps,
    words_of,
)
from tests.test_trained import SIZE, make

Made = dict[str, tuple[DualEncoder, Tokenizer]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    kinds = ("vit", "row_conv", "prompts", "dual_token", "dictionary")
    return {kind: make(kind, tmp_path_factory.mktemp(kind))[:2] for kind in kinds}


def image() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["vit", "row_conv", "prompts", "dual_token"])
def test_maps_of_words_are_cosines_of_tokens(kind: str, made: Made) -> None:
    encoder, tokenizer = made[kind]
    maps = word_maps(encoder, tokenizer, image(), "a red zebra coat")
    # "zebra" is not in the list, and for "coat" prompts leave no room.
    assert maps.words == (["a", "red"] if kind == "prompts" else ["a", "red", "coat"])
    with torch.inference_mode():
        output = encoder(image()[None], tokenizer(["a red zebra coat"]), details=True)
    place_PD = nn.functional.normalize(output.image_tokens[0, 1:], dim=1)
    rows, columns = place_grid(encoder, image())
    assert rows * columns == len(place_PD) > 3
    for word, map_RS in zip((1, 2, 4), maps.word_RS, strict=False):  # the start token stands first
        expected_P = place_PD @ nn.functional.normalize(output.text_tokens[0, word], dim=0)
        np.testing.assert_allclose(map_RS.ravel(), expected_P.numpy(), atol=1e-6)
        assert map_RS.shape == (rows, columns)
    expected_P = place_PD @ nn.functional.normalize(output.text_features[0], dim=0)
    np.testing.assert_allclose(maps.sentence_RS.ravel(), expected_P.numpy(), atol=1e-6)


def test_places_are_where_they_are_in_the_image(made: Made) -> None:
    """A map changes where the image does: a row tower's stripes see little beyond their own rows."""
    encoder, _ = made["row_conv"]
    changed = image()
    changed[:, -8:] = 0
    feature_D = torch.ones(encoder.features)
    difference = np.abs(likeness_map(encoder, image(), feature_D) - likeness_map(encoder, changed, feature_D))
    assert difference.ravel().argmax() == len(difference) - 1


@pytest.mark.parametrize("kind", ["vit", "prompts", "dual_token"])
def test_attention_is_that_of_the_last_block(kind: str, made: Made) -> None:
    encoder, _ = made[kind]
    attention = encoder.visual.transformer.resblocks[-1].attn
    before = encoder.encode_image(image()[None]).detach()
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    for task in ("t2i", "i2i"):
        found = attention_map(encoder, image(), task)
        assert found is not None
        with torch.inference_mode():
            packed = nn.functional.linear(seen[-1][0], attention.in_proj_weight, attention.in_proj_bias)
        query_NW, key_NW, _ = packed.chunk(3, 1)
        heads = [part.unflatten(1, (attention.num_heads, -1)).transpose(0, 1) for part in (query_NW, key_NW)]
        weight_HNN = (heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads[0].shape[2])).softmax(dim=2)
        row = 1 if kind == "dual_token" and task == "i2i" else 0
        expected = weight_HNN.mean(0)[row, -found.size :].numpy()
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)
        assert found.shape == place_grid(encoder, image()) and 0 < found.sum() < 1
    handle.remove()
    assert torch.equal(encoder.encode_image(image()[None]).detach(), before)
    assert not attention._forward_pre_hooks


def test_a_row_tower_has_no_attention(made: Made) -> None:
    assert attention_map(made["row_conv"][0], image()) is None


def test_long_sentences_keep_the_words_that_the_model_reads(made: Made) -> None:
    for kind, words in (("vit", 6), ("prompts", 2)):  # of 8 tokens start and end, and four prompts, are no words
        assert len(word_maps(*made[kind], image(), "red " * 30).words) == words


def test_words_of_several_pieces_are_one_word() -> None:
    tokenizer = OpenClipTokenizer("tests", 16, 49408)
    found = words_of(tokenizer, tokenizer(["a turquoise-ish overcoat, red"])[0].numpy())
    assert [word for word, _ in found] == ["a", "turquoise", "-", "ish", "overcoat", ",", "red"]
    assert sorted(place for _, places in found for place in places) == list(range(1, 1 + sum(len(p) for _, p in found)))
    listed = WordTokenizer(["a", "red", "coat"], 8, 20, framed=False)
    assert words_of(listed, listed(["red blue coat"])[0].numpy()) == [("red", [0]), ("coat", [2])]
    assert words_of(listed, listed(["nothing known"])[0].numpy()) == []


def test_models_without_places_say_so(made: Made, tmp_path: Path) -> None:
    encoder, tokenizer = made["dictionary"]
    assert "ResNetTower" in lacks_maps(encoder)
    with pytest.raises(UserError, match=r"^run: no heat maps: its image tower .* has no tokens"):
        require_maps(encoder, tokenizer, "run")
    vit, words = made["vit"]
    assert lacks_maps(vit) == lacks_maps(vit, words) == ""
    words.mask_id = -1
    assert "which tokens make a word" in lacks_maps(vit, words)
