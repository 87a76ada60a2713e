"""The word list tokenizer, open_clip's, and the vocabulary command."""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.data.tokenizer import (
    NO_LABEL,
    Tokenizer,
    WordTokenizer,
    build_tokenizer,
    main,
    mask_words,
    read_vocabulary,
    split_words,
    write_vocabulary,
)
from reid_dist.data.transforms import sample_rng
from reid_dist.errors import UserError

Build = Callable[..., Path]


def test_word_ids() -> None:
    tokenizer = WordTokenizer(["a", "man", "hat"], context_length=6, vocab_size=10)
    tokens = tokenizer(["A man, wearing a HAT.", "", "hat"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [2, 3, 4, 1, 3, 9],  # cut after four words, the end token stays
        [2, 9, 0, 0, 0, 0],
        [2, 5, 9, 0, 0, 0],
    ]
    assert tokens.argmax(dim=1).tolist() == [5, 1, 2]  # how open_clip pools
    assert tokenizer([]).shape == (0, 6)


def test_words_alone() -> None:
    tokenizer = WordTokenizer(["red", "coat"], context_length=4, vocab_size=4, framed=False)
    tokens = tokenizer(["A red coat, red.", "coat", "", "one two three four red"])
    assert tokens.tolist() == [[1, 2, 3, 2], [3, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert tokenizer.truncated_share(["a b c d", "a b c d e"]) == 0.5
    assert tokenizer.word_ids == (2, 4) and tokenizer.word_numbers(tokens[0].numpy()).tolist() == [-1, 0, 1, 2]
    masked_L, label_L = mask_words(tokenizer, tokens[0].numpy(), np.random.default_rng(0), 0.99)
    assert (label_L[1:] == tokens[0, 1:].numpy()).all() and label_L[0] == NO_LABEL and len(masked_L) == 4
    with pytest.raises(UserError, match="needs vocab_size >= 4"):
        WordTokenizer(["red", "coat"], 4, 3, framed=False)


def test_shares() -> None:
    tokenizer = WordTokenizer(["a", "man"], context_length=4, vocab_size=10)
    assert tokenizer.truncated_share(["a man", "a tall man", "a", "man man man"]) == 0.5
    assert tokenizer.truncated_share([]) == 0


def test_vocabulary_that_does_not_fit() -> None:
    assert WordTokenizer(["a", "b"], 5, 6)(["b"]).max() == 5
    with pytest.raises(UserError, match="3 words needs vocab_size >= 7, not 6"):
        WordTokenizer(["a", "b", "c"], 5, 6)
    with pytest.raises(UserError, match="context_length 2"):
        WordTokenizer(["a"], 2, 6)


def test_pickle() -> None:
    tokenizer = WordTokenizer(["a"], 5, 6)
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(["a b"]), tokenizer(["a b"]))


def test_vocabulary_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "vocabulary.txt"
    written = write_vocabulary(Counter({"b": 2, "a": 2, "c": 5, "rare": 1}), path, min_count=2)
    assert written == ["c", "a", "b"] == read_vocabulary(path)
    assert path.read_text() == "c\na\nb\n" and [p.name for p in path.parent.iterdir()] == [path.name]
    tokenizer = build_tokenizer(path, "anything", 5, 10)
    assert tokenizer(["a b c"]).tolist() == [[2, 4, 5, 3, 9]]
    assert (tokenizer.context_length, tokenizer.vocab_size) == (5, 10)


@pytest.mark.parametrize("text", ["a\nb\na\n", "a\n\nb\n", "two words\n", "Upper\n"])
def test_malformed_vocabulary(tmp_path: Path, text: str) -> None:
    path = tmp_path / "v.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"v\.txt: line \d .*reid_dist\.data\.tokenizer build"):
        read_vocabulary(path)


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v\.txt: the vocabulary cannot be read"):
        build_tokenizer(tmp_path / "v.txt", "x", 5, 10)


@pytest.mark.parametrize("name", ["ViT-B-16", "our-own.json"])
def test_open_clip(name: str) -> None:
    tokenizer = build_tokenizer(None, name, 8, 49408)
    tokens = tokenizer(["a man", "a man " * 9])
    assert tokens.shape == (2, 8) and tokens.dtype == torch.int64
    assert tokens.argmax(dim=1).tolist() == [3, 7]
    # start, six words and end are eight tokens: they fit exactly
    assert tokenizer.truncated_share(["a man", "a man " * 3, "a man " * 4, "a man " * 9]) == 0.5
    with pytest.raises(UserError, match="49408 tokens, the model's vocab_size is 100"):
        build_tokenizer(None, name, 8, 100)


def test_build_reads_training_captions_only(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "v.txt"
    assert main(["build", str(build("one")), str(build("two")), "--out", str(out)]) == 0
    words = read_vocabulary(out)
    # "caption", "picture" 60 times, "one", "two" 30 times; numbers 15 to 21 are in test captions only
    assert words[:4] == ["caption", "picture", "0", "1"] and {"one", "two", "14"} <= set(words)
    assert not {str(number) for number in range(15, 22)} & set(words)
    assert "words" in capsys.readouterr().out


def test_build_says_what_is_wrong(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(tmp_path / "none"), "--out", str(tmp_path / "v.txt")]) == 2
    assert main(["build", str(build(captions=0)), "--out", str(tmp_path / "v.txt")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no such shard folder" in lines[0] and "no captions" in lines[1]


# Hiding words

SENTENCE = (
    "a woman with reddish-pink sneakers carries a dark turquoise messengerbag and a polkadotted umbrella in both hands"
)
_WORDS = sorted({word for word in split_words(SENTENCE) if word != "umbrella"})


def _tokenizers() -> list[Tokenizer]:
    return [WordTokenizer(_WORDS, 30, 50), build_tokenizer(None, "ViT-B-16", 40, 49408)]


def _words_of(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Oracle: the positions of each word's tokens, from tokenising the words one by one."""
    if isinstance(tokenizer, WordTokenizer):
        words = split_words(text)
        return [[1 + position] for position, word in enumerate(words) if word in _WORDS]
    spans, position = [], 1
    for word in text.replace("-", " - ").split():
        count = int((tokenizer([word])[0] != 0).sum()) - 2
        spans.append(list(range(position, position + count)))
        position += count
    return spans


@pytest.mark.parametrize("number", [0, 1])
def test_word_numbers(number: int) -> None:
    tokenizer = _tokenizers()[number]
    token_L = tokenizer([SENTENCE])[0].numpy()
    number_L = tokenizer.word_numbers(token_L)
    found = [np.flatnonzero(number_L == word).tolist() for word in np.unique(number_L) if word >= 0]
    assert found == _words_of(tokenizer, SENTENCE)
    if number == 1:
        assert max(map(len, found)) >= 3  # words of several pieces are there
    assert (tokenizer.word_numbers(tokenizer([""])[0].numpy()) == -1).all()
    assert (tokenizer.word_numbers(np.zeros(30, np.int64)) == -1).all()  # the row of a sample without captions


@pytest.mark.parametrize("number", [0, 1])
def test_hidden_words(number: int) -> None:
    """Rates by statistics (4 standard errors), everything else in each single draw."""
    tokenizer = _tokenizers()[number]
    token_L = tokenizer([SENTENCE])[0].numpy()
    words = _words_of(tokenizer, SENTENCE)
    eligible = {position for word in words for position in word}
    before = token_L.copy()
    chosen, fates, wrong = 0, {"mask": 0, "same": 0, "wrong": 0}, []
    rounds = 3000
    for row in range(rounds):
        masked_L, label_L = mask_words(tokenizer, token_L, sample_rng(0, 0, row))
        assert masked_L.dtype == label_L.dtype == np.int64
        labelled = set(np.flatnonzero(label_L != NO_LABEL).tolist())
        assert labelled and labelled <= eligible
        assert set(np.flatnonzero(masked_L != token_L).tolist()) <= labelled
        assert all(label_L[position] == token_L[position] for position in labelled)
        for word in words:
            if word[0] not in labelled:
                assert not labelled & set(word)
                continue
            assert set(word) <= labelled  # whole or not at all
            chosen += 1
            new = masked_L[word]
            if (new == tokenizer.mask_id).all():
                fates["mask"] += 1
            elif np.array_equal(new, token_L[word]):
                fates["same"] += 1
            else:
                fates["wrong"] += 1
                wrong.extend(new.tolist())
    assert np.array_equal(token_L, before)
    # At least one word is hidden, which adds the chance that none would have been.
    share = 0.15 + 0.85 ** len(words) / len(words)
    trials = rounds * len(words)
    assert abs(chosen / trials - share) < 4 * (share / trials) ** 0.5
    # A random token of a short list is now and then the old one.
    same = 0.1 + (0.1 / len(_WORDS) if number == 0 else 0)
    for fate, expected in (("mask", 0.8), ("same", same), ("wrong", 0.2 - same)):
        assert abs(fates[fate] / chosen - expected) < 4 * (expected / chosen) ** 0.5, fate
    low, high = tokenizer.word_ids
    assert low <= min(wrong) and max(wrong) < high and tokenizer.mask_id not in wrong
    assert len(set(wrong)) > (0.8 * len(_WORDS) if number == 0 else 0.9 * len(wrong))


def test_hiding_is_seeded_and_draws_alike() -> None:
    tokenizer = _tokenizers()[0]
    rows = tokenizer([SENTENCE, "a woman", "umbrella", ""]).numpy()
    following = set()
    for token_L in rows:
        rng = sample_rng(1, 2, 3, 4)
        masked_L, label_L = mask_words(tokenizer, token_L, rng)
        following.add(float(rng.random()))
        again = mask_words(tokenizer, token_L, sample_rng(1, 2, 3, 4))
        assert np.array_equal(masked_L, again[0]) and np.array_equal(label_L, again[1])
    assert len(following) == 1
    # No word that it knows: nothing is asked.
    for token_L in rows[2:]:
        masked_L, label_L = mask_words(tokenizer, token_L, sample_rng(0, 0, 0))
        assert np.array_equal(masked_L, token_L) and (label_L == NO_LABEL).all()


def test_share_of_hidden_words() -> None:
    tokenizer = _tokenizers()[0]
    token_L = tokenizer([SENTENCE])[0].numpy()
    known = len(_words_of(tokenizer, SENTENCE))
    for share, least, most in ((0.0, 1, 1), (1.0, known, known), (0.5, 1, known)):
        counts = [(mask_words(tokenizer, token_L, sample_rng(0, 0, r), share)[1] != NO_LABEL).sum() for r in range(50)]
        assert least <= min(counts) and max(counts) <= most
    first = [np.flatnonzero(mask_words(tokenizer, token_L, sample_rng(0, 0, r), 0.0)[1] + 100)[0] for r in range(400)]
    assert len(set(first)) == known  # the one that is hidden at least may be any


def test_single_tokens_are_hidden_as_irra_does() -> None:
    """Eligible by 0 < id < 49405, each by itself; rates within 4 standard errors (methods.md A4)."""
    tokenizer = build_tokenizer(None, "ViT-B-16", 40, 49408)
    token_L = tokenizer([f"{SENTENCE} shoes jekyll"])[0].numpy()
    token_L[token_L.argmax() - 2] = 0  # "!" inside of a word, and padding
    eligible = [place for place, token in enumerate(token_L.tolist()) if 0 < token < 49405]
    assert len(eligible) == token_L.argmax() - 3  # neither start, "!" nor the mask's own word
    spans = [span for span in _words_of(tokenizer, SENTENCE) if len(span) > 1]
    rounds, labelled, fates, split = 4000, np.zeros(40), {"mask": 0, "same": 0, "wrong": 0}, 0
    for row in range(rounds):
        masked_L, label_L = mask_words(tokenizer, token_L, sample_rng(0, 1, row), form="tokens")
        asked_L = label_L != NO_LABEL
        assert asked_L.any() and set(np.flatnonzero(asked_L)) <= set(eligible)
        assert (label_L[asked_L] == token_L[asked_L]).all() and (masked_L[~asked_L] == token_L[~asked_L]).all()
        labelled += asked_L
        split += any(asked_L[span].any() and not asked_L[span].all() for span in spans)
        if asked_L.sum() > 1:  # not those that are hidden because none was
            for new, old in zip(masked_L[asked_L], token_L[asked_L], strict=True):
                fates["mask" if new == 49405 else "same" if new == old else "wrong"] += 1
                assert 0 < new <= 49405
    assert split > rounds / 10  # a word's pieces go by themselves
    none = 0.85 ** len(eligible)
    for place in eligible:
        share = 0.15 + (none if place == 1 else 0)
        assert abs(labelled[place] / rounds - share) < 4 * (share / rounds) ** 0.5, place
    for fate, share in (("mask", 0.8), ("same", 0.1), ("wrong", 0.1)):
        assert abs(fates[fate] / sum(fates.values()) - share) < 4 * (share / sum(fates.values())) ** 0.5, fate


@pytest.mark.parametrize("number", [0, 1])
def test_where_no_token_is_chosen_the_first_becomes_the_mask(number: int) -> None:
    tokenizer = _tokenizers()[number]
    token_L = tokenizer([SENTENCE])[0].numpy()
    for row in range(50):
        masked_L, label_L = mask_words(tokenizer, token_L, sample_rng(0, 0, row), 0.0, "tokens")
        assert np.flatnonzero(label_L != NO_LABEL).tolist() == [1] and label_L[1] == token_L[1]
        assert masked_L[1] == tokenizer.mask_id and (masked_L[2:] == token_L[2:]).all()
    for nothing in (tokenizer([""])[0].numpy(), np.zeros(30, np.int64)):
        masked_L, label_L = mask_words(tokenizer, nothing, sample_rng(0, 0, 0), 0.5, "tokens")
        assert np.array_equal(masked_L, nothing) and (label_L == NO_LABEL).all()


def test_the_word_under_the_mask_is_never_asked_for() -> None:
    tokenizer = build_tokenizer(None, "ViT-B-16", 10, 49408)
    token_L = tokenizer(["a jekyll"])[0].numpy()
    assert tokenizer.mask_id == 49405 and tokenizer.mask_id in token_L
    assert tokenizer.word_numbers(token_L).tolist() == [-1, 0] + [-1] * 8


def test_tokenizers_without_a_mask_say_so() -> None:
    tokenizer = _tokenizers()[0]
    tokenizer.mask_id = -1
    with pytest.raises(UserError, match="no mask token; give a vocabulary file"):
        mask_words(tokenizer, np.zeros(30, np.int64), sample_rng(0, 0, 0))
