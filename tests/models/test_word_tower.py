"""TextReID's text tower: against packed sequences and the published pooling, its size, padding, and what is frozen."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.dictionary import Dictionary, write_dictionary
from reid_dist.models.projection import projection_names
from reid_dist.models.tower import TowerOutput
from reid_dist.models.word_tower import WordGRU, build_word_tower

LENGTH = 11


def make(padding: str = "masked", **settings) -> WordGRU:
    torch.manual_seed(0)
    sizes = {"rows": 50, "output_dim": 12, "width": 6, "features": 6, "hidden": 5, "context_length": LENGTH}
    return WordGRU(**{**sizes, **settings}, padding=padding)


def make_tokens(lengths: list[int], columns: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    token_BL = torch.randint(1, 50, (len(lengths), columns), generator=generator)
    for row, length in enumerate(lengths):
        token_BL[row, length:] = 0
    return token_BL


def packed_states(tower: WordGRU, token_BL: Tensor) -> tuple[Tensor, Tensor]:
    """States as TextReID's code makes them: torch's own bidirectional GRU on packed sequences, zeros in the padding."""
    gru = nn.GRU(tower.words.shape[1], 5, bias=False, bidirectional=True, batch_first=True).double()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        getattr(gru, name).data.copy_(getattr(tower.forward_gru, name))
        getattr(gru, f"{name}_reverse").data.copy_(getattr(tower.backward_gru, name))
    length_B = (token_BL != 0).sum(1)
    x = pack_padded_sequence(tower.words.double()[token_BL], length_B, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(gru(x)[0], batch_first=True, total_length=token_BL.shape[1])[0], length_B


def head(tower: WordGRU, x: Tensor) -> Tensor:
    return x @ tower.projection.weight.double().T + tower.projection.bias.double()


def test_the_published_model_s_numbers_of_parameters() -> None:
    """Methods.md 3.3: 9,408 x 512 words, one BiGRU layer of 512 each way without biases, one Linear to 256."""
    with torch.device("meta"):
        tower = WordGRU(9408, 256, train_words=False)
    shapes = {name: tuple(p.shape) for name, p in tower.named_parameters()}
    assert shapes == {
        "words": (9408, 512),
        "forward_gru.weight_ih_l0": (1536, 512),
        "forward_gru.weight_hh_l0": (1536, 512),
        "backward_gru.weight_ih_l0": (1536, 512),
        "backward_gru.weight_hh_l0": (1536, 512),
        "projection.weight": (256, 1024),
        "projection.bias": (256,),
    }
    assert tower.context_length == 105 and tower.vocab_size == 9408
    assert sum(p.numel() for p in tower.parameters() if p.requires_grad) == 3_145_728 + 262_400
    assert [name for name, p in tower.named_parameters() if not p.requires_grad] == ["words"]


def test_masked_features_are_the_maximum_over_the_words_of_packed_sequences() -> None:
    tower, token_BL = make(), make_tokens([1, 4, LENGTH, 7])
    states_BLH, length_B = packed_states(tower, token_BL)
    pooled = torch.stack([states[:length].amax(0) for states, length in zip(states_BLH, length_B, strict=True)])
    torch.testing.assert_close(tower(token_BL).double(), head(tower, pooled), rtol=1e-5, atol=1e-6)


def test_published_features_are_the_maximum_over_words_and_zeros_up_to_the_fixed_length() -> None:
    tower, token_BL = make("published"), make_tokens([1, 4, LENGTH, 7])
    states_BLH, _ = packed_states(tower, token_BL)
    expected = head(tower, states_BLH.amax(1))  # the longest caption fills the length, so it sees no zeros
    torch.testing.assert_close(tower(token_BL).double(), expected, rtol=1e-5, atol=1e-6)
    masked = make("masked")(token_BL)
    same_B = torch.isclose(tower(token_BL), masked, atol=1e-6).all(1)
    assert not same_B[0] and same_B[2]  # seven words may well have no maximum below zero


@pytest.mark.parametrize("padding", ["masked", "published"])
def test_a_caption_s_features_depend_on_nothing_beside_it(padding: str) -> None:
    tower, token_BL = make(padding), make_tokens([2, 5, LENGTH])
    together = tower(token_BL)
    for row, length in enumerate((2, 5, LENGTH)):
        torch.testing.assert_close(tower(token_BL[row : row + 1])[0], together[row])
        torch.testing.assert_close(tower(token_BL[row : row + 1, :length])[0], together[row])


def test_words_beyond_the_context_are_cut_off() -> None:
    tower = make()
    token_BL = make_tokens([15, 20], columns=20)
    assert tower(token_BL).equal(tower(token_BL[:, :LENGTH]))


@pytest.mark.parametrize("padding", ["masked", "published"])
def test_a_caption_without_words_has_finite_features_and_gradients(padding: str) -> None:
    tower = make(padding)
    features = tower(make_tokens([0, 3]))
    assert features[0].equal(tower.projection.bias)
    features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_every_word_of_a_caption_counts_in_both_directions() -> None:
    tower, token_BL = make(), make_tokens([5])
    features = tower(token_BL, details=True).tokens[0]
    for changed in range(5):
        other_BL = token_BL.clone()
        other_BL[0, changed] = token_BL[0, changed] % 49 + 1
        moved_L = (tower(other_BL, details=True).tokens[0] - features).abs().amax(1) > 0
        assert moved_L.tolist() == [True] * 5 + [False] * (LENGTH - 5)


def test_tokens_are_the_projected_states_and_their_features_the_same() -> None:
    tower, token_BL = make(), make_tokens([1, 4, 8])
    output = tower(token_BL, details=True)
    assert isinstance(output, TowerOutput) and output.i2i_features is None and tower.gives_tokens
    assert output.features.equal(tower(token_BL)) and output.tokens.shape == (3, LENGTH, 12)
    states_BLH, _ = packed_states(tower, token_BL)
    torch.testing.assert_close(output.tokens.double(), head(tower, states_BLH), rtol=1e-5, atol=1e-6)


def test_its_projection_is_the_last_linear_map() -> None:
    tower, token_BL = make(), make_tokens([1, 4, 8])
    before = tower(token_BL).detach()
    names = projection_names(tower)
    assert names == {"projection.weight", "projection.bias"}
    with torch.no_grad():
        for name in names:
            tower.get_parameter(name).mul_(2)
    assert tower(token_BL).equal(2 * before)


@pytest.mark.parametrize("padding", ["masked", "published"])
def test_the_padding_vector_never_learns(padding: str) -> None:
    tower = make(padding)
    tower(make_tokens([2, 5])).square().sum().backward()
    assert tower.words.grad is not None and not tower.words.grad[0].any() and tower.words.grad.any()


def test_frozen_words_get_no_gradient_and_a_map_where_the_width_differs() -> None:
    tower = make(width=4, train_words=False)
    assert tower.word_map is not None and tower.word_map.weight.shape == (6, 4)
    tower(make_tokens([2, 5])).square().sum().backward()
    assert tower.words.grad is None and tower.word_map.weight.grad is not None
    assert make().word_map is None


def test_the_linear_maps_are_drawn_as_published() -> None:
    tower = WordGRU(4, 400, width=300, features=512, hidden=256)
    assert tower.word_map is not None
    for linear, fan_out in ((tower.word_map, 512), (tower.projection, 400)):
        assert float(linear.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert not linear.bias.any()


def test_autocast_leaves_the_states_exact_and_rounds_the_maps() -> None:
    tower, token_BL = make(), make_tokens([3, 9])
    seen: list[Tensor] = []
    tower.projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    plain = tower(token_BL)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tower(token_BL)
    assert rounded.dtype == torch.bfloat16 and seen[0].equal(seen[1])
    torch.testing.assert_close(rounded.float(), plain, rtol=0.02, atol=0.02)


def test_a_copy_is_independent_and_follows_its_own_weights() -> None:
    tower, token_BL = make(), make_tokens([3, 9])
    twin = copy.deepcopy(tower)
    assert twin(token_BL).equal(tower(token_BL))
    with torch.no_grad():
        twin.forward_gru.weight_ih_l0.mul_(0.5)
    assert not twin(token_BL).equal(tower(token_BL)) and make()(token_BL).equal(tower(token_BL))


# From settings


def write(folder: Path, words: list[str], width: int = 6) -> Path:
    vectors_NW = torch.randn(len(words), width, generator=torch.Generator().manual_seed(1))
    write_dictionary(folder / "words.safetensors", Dictionary(words, vectors_NW), "key")
    return folder / "words.safetensors"


def settings(dictionary: Path | None = None, vocabulary: Path | None = None, **word_gru) -> ModelConfig:
    return ModelConfig(
        architecture="RN50", vocabulary=vocabulary, word_gru={"dictionary": dictionary, "features": 6, **word_gru}
    )


def test_a_dictionary_s_vectors_are_frozen_behind_zeros_for_padding_and_unknown_words(tmp_path: Path) -> None:
    path = write(tmp_path, ["red", "blue", "hat"])
    tower = build_word_tower(settings(path), 12)
    expected = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    assert tower.words[2:].equal(expected) and not tower.words[:2].any() and not tower.words.requires_grad
    assert build_word_tower(settings(path, train_words=True), 12).words.requires_grad
    assert build_word_tower(settings(path, features=9), 12).word_map is not None
    with torch.device("meta"):
        assert build_word_tower(settings(path), 12).words.shape == (5, 6)


def test_words_of_a_vocabulary_are_learned(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_text("red\nblue\nhat\ncoat\n")
    tower = build_word_tower(settings(vocabulary=path), 12)
    assert tower.words.shape == (6, 6) and tower.words.requires_grad and not tower.words[0].any()
    with pytest.raises(UserError, match=r"model\.vocabulary: .*absent\.txt cannot be read .*tokenizer build"):
        build_word_tower(settings(vocabulary=tmp_path / "absent.txt"), 12)


def test_rows_stand_for_a_file_that_is_not_there_yet_where_only_shapes_are_wanted(tmp_path: Path) -> None:
    absent = tmp_path / "absent.safetensors"
    for model in (settings(absent, rows=9), settings(vocabulary=absent, rows=9)):
        with torch.device("meta"):
            tower = build_word_tower(model, 12)
        assert tower.words.shape == (9, 6) and tower.words.requires_grad == (model.vocabulary is not None)
        with pytest.raises(UserError, match="absent"):
            build_word_tower(model, 12)
    with torch.device("meta"), pytest.raises(UserError, match="absent"):
        build_word_tower(settings(absent), 12)
    path = write(tmp_path, ["red", "blue", "hat"])
    with torch.device("meta"):
        assert build_word_tower(settings(path, rows=9), 12).words.shape == (5, 6)
