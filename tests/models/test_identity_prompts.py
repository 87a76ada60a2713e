import re

import pytest
import torch
from torch import Tensor

from reid_dist.config import ModelConfig
from reid_dist.data.tokenizer import OpenClipTokenizer, WordTokenizer
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.identity_prompts import IdentityPrompts
from reid_dist.models.text_transformer import TextTower

WORDS = ["a", "photo", "of", "person"]
# start = 2, a photo of person = 3..6, unknown = 1, end = 49
TOKENIZER = WordTokenizer(WORDS, 12, 50)


@pytest.fixture
def tower(architectures: dict[str, str], configs: dict) -> TextTower:
    import json
    from pathlib import Path

    config = configs["row_conv"]
    config["text_cfg"]["context_length"] = 12
    Path(architectures["row_conv"]).write_text(json.dumps(config))
    torch.manual_seed(0)
    text = build_dual_encoder(ModelConfig(architecture=architectures["row_conv"], image_size=(64, 32))).text
    assert isinstance(text, TextTower)
    return text.eval()


def test_the_learned_tokens_stand_where_the_template_says(tower: TextTower) -> None:
    prompts = IdentityPrompts(tower, TOKENIZER, "A photo of a {} person.", 4, identities=3)
    token_BL, inserted_BMW = prompts(torch.tensor([2, 0]))
    assert token_BL.tolist() == [[2, 3, 4, 5, 3, 1, 1, 1, 1, 6, 49]] * 2
    assert prompts.at == 5
    assert torch.equal(inserted_BMW, prompts.token_CMW[[2, 0]])


@pytest.mark.parametrize(("template", "at"), [("{} person", 1), ("photo of {}", 3), ("{}", 1)])
def test_the_tokens_may_stand_first_or_last(tower: TextTower, template: str, at: int) -> None:
    prompts = IdentityPrompts(tower, TOKENIZER, template, 2, identities=3)
    token_BL, _ = prompts(torch.tensor([0]))
    assert prompts.at == at
    assert token_BL[0, at : at + 2].tolist() == [1, 1]
    assert token_BL[0].tolist().count(1) == 2


def test_the_sentence_of_the_paper_in_clips_own_tokens() -> None:
    """A photo of a X X X X person. -> start, 4 words, 4 x "x", person, ".", end."""
    model = build_dual_encoder(ModelConfig(architecture="ViT-B-32", image_size=(224, 224)))
    prompts = IdentityPrompts(model.text, OpenClipTokenizer("ViT-B-32", 77, 49408), "a photo of a {} person.", 4, 2)
    token_BL, inserted_BMW = prompts(torch.tensor([1]))
    assert token_BL.tolist() == [[49406, 320, 1125, 539, 320, 343, 343, 343, 343, 2533, 269, 49407]]
    assert prompts.at == 5
    assert inserted_BMW.shape == (1, 4, 512)
    assert float(prompts.token_CMW.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_a_sentence_equals_the_whole_context_with_the_embeddings_replaced_by_hand(tower: TextTower) -> None:
    """What CLIP-ReID does: all L positions, learned embeddings between prefix and suffix, the end token's feature."""
    prompts = IdentityPrompts(tower, TOKENIZER, "a photo of a {} person", 4, identities=3)
    label = torch.tensor([1, 1, 2])
    token_BL, inserted_BMW = prompts(label)
    found = tower(token_BL, inserted_BMW=inserted_BMW, at=prompts.at)

    full = TOKENIZER(["a photo of a x x x x person"])
    x = tower.token_embedding(full).expand(3, -1, -1).clone()
    x[:, 5:9] = prompts.token_CMW[label]
    x = tower.transformer(x + tower.positional_embedding, attn_mask=tower.attn_mask)
    expected = tower.ln_final(x)[:, 10] @ tower.text_projection
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_only_the_identities_asked_for_get_a_gradient(tower: TextTower) -> None:
    prompts = IdentityPrompts(tower, TOKENIZER, "a photo of a {} person", 2, identities=4)
    token_BL, inserted_BMW = prompts(torch.tensor([3, 1]))
    tower(token_BL, inserted_BMW=inserted_BMW, at=prompts.at).sum().backward()
    gradient = prompts.token_CMW.grad
    assert isinstance(gradient, Tensor)
    assert (gradient.abs().sum(dim=(1, 2)) > 0).tolist() == [False, True, False, True]
    assert [name for name, _ in prompts.named_parameters()] == ["token_CMW"]
    assert list(prompts.state_dict()) == ["token_CMW"]


def test_a_sentence_that_is_too_long_is_refused(tower: TextTower) -> None:
    with pytest.raises(UserError, match=re.escape("loss.template: 'a photo of a {} person' with loss.tokens: 6")):
        IdentityPrompts(tower, TOKENIZER, "a photo of a {} person", 6, identities=3)
    IdentityPrompts(tower, TOKENIZER, "a photo of a {} person", 5, identities=3)


def test_a_tower_without_an_end_token_is_refused(tower: TextTower) -> None:
    tower.pool_type = "last"
    with pytest.raises(UserError, match="kind: identity_prompt: this architecture's text tower"):
        IdentityPrompts(tower, TOKENIZER, "a {} person", 2, identities=3)
    with pytest.raises(UserError, match="choose an architecture such as ViT-B-16"):
        IdentityPrompts(torch.nn.Linear(2, 2), TOKENIZER, "a {} person", 2, identities=3)


def test_a_dry_run_knows_the_length_without_a_tokenizer(tower: TextTower) -> None:
    known = IdentityPrompts(tower, TOKENIZER, "a photo of a {} person", 4, identities=3)
    guessed = IdentityPrompts(tower, None, "a photo of a {} person", 4, identities=3)
    assert guessed.token_L.shape == known.token_L.shape
    token_BL, inserted_BMW = guessed(torch.tensor([1]))
    assert tower(token_BL, inserted_BMW=inserted_BMW, at=guessed.at).shape == (1, 12)


def test_a_sentence_that_is_too_long_is_refused_without_a_tokenizer_too(tower: TextTower) -> None:
    with pytest.raises(UserError, match=r"loss\.tokens: 90 does not fit into"):
        IdentityPrompts(tower, None, "a {} person", 90, 3)
