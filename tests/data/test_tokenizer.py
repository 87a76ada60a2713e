"""The word list tokenizer, open_clip's, and the vocabulary command."""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist.data.tokenizer import (
    WordTokenizer,
    build_tokenizer,
    main,
    read_vocabulary,
    write_vocabulary,
)
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


def test_shares() -> None:
    tokenizer = WordTokenizer(["a", "man"], context_length=4, vocab_size=10)
    assert tokenizer.truncated_share(["a man", "a tall man", "a", "man man man"]) == 0.5
    assert tokenizer.unknown_share(["a tall man"]) == pytest.approx(1 / 3)
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
